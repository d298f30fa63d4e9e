package filedev

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"basalt/block"
)

// The byte at slotLockBase + slot is locked by the slot's holder. It lies far
// beyond the data. Both constants are shared by all processes that open the file,
// of whatever version.
const (
	slotLockBase = 1 << 62
	maxSlots     = 1 << 16
)

// strangerWait is how long Fence waits for a lock whose holder it may not kill;
// an exit that is under way fits into it.
const strangerWait = 500 * time.Millisecond

// guards are the slots that this Device guards.
type guards struct {
	mu         sync.Mutex     // guards generation
	generation map[int]uint32 // by slot
}

// Kinds is FenceOFD on a writable regular file of a local filesystem, and
// FenceExclusive on a block device, which one open at a time can write; else none.
func (d *Device) Kinds() block.FenceKinds {
	if d.opts.ReadOnly {
		return 0
	}
	return d.witnesses()
}

// witnesses are the methods whose effect on others this Device can see, also when
// it is open for reading only.
func (d *Device) witnesses() block.FenceKinds {
	switch {
	case d.geo.SharedCAW:
		return block.FenceOFD
	case d.blockDev && !d.opts.ReadOnly:
		return block.FenceExclusive
	}
	return 0
}

func (d *Device) checkSlot(slot int) error {
	if d.Kinds() == 0 {
		return fmt.Errorf("filedev: fencing on %s: %w", d.path, block.ErrNotSupported)
	}
	return checkSlotNumber(slot)
}

func checkSlotNumber(slot int) error {
	if slot < 0 || slot >= maxSlots {
		return fmt.Errorf("filedev: slot %d is not below %d: %w", slot, maxSlots, block.ErrOutOfRange)
	}
	return nil
}

// Guard locks the slot's byte without waiting, on the descriptor that carries all
// writes of this Device.
func (d *Device) Guard(ctx context.Context, slot int, generation uint32) error {
	if err := d.begin(ctx); err != nil {
		return err
	}
	defer d.end()
	if err := d.checkSlot(slot); err != nil {
		return err
	}
	d.guards.mu.Lock()
	defer d.guards.mu.Unlock()
	if have, ok := d.guards.generation[slot]; ok {
		return fmt.Errorf("filedev: slot %d of %s: %w: this device guards its generation %d", slot, d.path, block.ErrBusy, have)
	}
	err := d.lockSlot(unix.F_WRLCK, slot)
	if isLockHeld(err) {
		return fmt.Errorf("filedev: slot %d of %s: %w", slot, d.path, block.ErrBusy)
	}
	if err != nil {
		return fmt.Errorf("filedev: guard slot %d of %s: %w", slot, d.path, err)
	}
	if d.guards.generation == nil {
		d.guards.generation = make(map[int]uint32)
	}
	d.guards.generation[slot] = generation
	return nil
}

// Unguard unlocks the slot's byte.
func (d *Device) Unguard(ctx context.Context, slot int) error {
	if err := d.begin(ctx); err != nil {
		return err
	}
	defer d.end()
	if err := d.checkSlot(slot); err != nil {
		return err
	}
	d.guards.mu.Lock()
	defer d.guards.mu.Unlock()
	if _, ok := d.guards.generation[slot]; !ok {
		return fmt.Errorf("filedev: slot %d of %s is not guarded by this device", slot, d.path)
	}
	if err := d.lockSlot(unix.F_UNLCK, slot); err != nil {
		return fmt.Errorf("filedev: unguard slot %d of %s: %w", slot, d.path, err)
	}
	delete(d.guards.generation, slot)
	return nil
}

// lockSlot changes the lock of a slot's byte. A device that is opened exclusively
// needs none.
func (d *Device) lockSlot(kind int16, slot int) error {
	if d.blockDev {
		return nil
	}
	return setLock(d.fd, kind, slotLockBase+int64(slot), 1)
}

// Gone is true when a holder of this boot no longer has its lock. Of another boot
// nothing can be told, nor of a slot that this Device itself guards.
func (d *Device) Gone(ctx context.Context, h block.Holder) (bool, error) {
	if err := d.begin(ctx); err != nil {
		return false, err
	}
	defer d.end()
	if d.witnesses()&h.Fencers == 0 {
		return false, nil
	}
	if err := checkSlotNumber(h.Slot); err != nil {
		return false, err
	}
	boot, err := bootID()
	if err != nil {
		return false, err
	}
	if boot != h.Process.BootID {
		return false, nil
	}
	if _, mine := d.guarded(h.Slot); mine {
		return false, nil
	}
	return d.slotFree(h.Slot)
}

// Fence makes sure that the holder's lock is gone, killing the holder if it is a
// process of this boot and pid namespace that still has it. The lock of another
// boot is gone with its kernel, as only one kernel can have a local file open;
// then a lock that is held belongs to someone else, and Fence returns ErrBusy.
func (d *Device) Fence(ctx context.Context, h block.Holder) error {
	if err := d.begin(ctx); err != nil {
		return err
	}
	defer d.end()
	if d.Kinds()&h.Fencers == 0 {
		return fmt.Errorf("filedev: fence slot %d of %s: holder advertises %v: %w", h.Slot, d.path, h.Fencers, block.ErrNotSupported)
	}
	if err := d.checkSlot(h.Slot); err != nil {
		return err
	}
	if err := d.mayJudge(h); err != nil {
		return err
	}
	if generation, mine := d.guarded(h.Slot); mine {
		if generation == h.Generation {
			return fmt.Errorf("filedev: fence slot %d of %s: %w: this device is the holder", h.Slot, d.path, block.ErrBusy)
		}
		return nil // holding the lock proves that no other generation does
	}
	free, err := d.slotFree(h.Slot)
	if err != nil || free {
		return err
	}
	wait := d.opts.FenceWait
	killErr := kill(h.Process)
	if killErr != nil {
		wait = min(wait, strangerWait)
	}
	waitCtx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	err = d.awaitSlotFree(waitCtx, h.Slot)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case !errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("filedev: fence slot %d of %s: %w", h.Slot, d.path, err)
	case killErr != nil:
		return fmt.Errorf("filedev: fence slot %d of %s: %w: its lock is held, and %w", h.Slot, d.path, block.ErrBusy, killErr)
	default:
		return fmt.Errorf("filedev: fence slot %d of %s: %w: process %d was killed, but its lock is held after %v", h.Slot, d.path, block.ErrBusy, h.Process.PID, wait)
	}
}

// mayJudge refuses to speak of another machine's holder on a block device: the
// exclusive open reaches only this machine's processes.
func (d *Device) mayJudge(h block.Holder) error {
	if !d.blockDev {
		return nil
	}
	id, err := MachineID()
	if err != nil {
		return err
	}
	if id != h.HostID {
		return fmt.Errorf("filedev: fence slot %d of %s: the holder is another machine: %w", h.Slot, d.path, block.ErrNotSupported)
	}
	return nil
}

func (d *Device) guarded(slot int) (generation uint32, mine bool) {
	d.guards.mu.Lock()
	defer d.guards.mu.Unlock()
	generation, mine = d.guards.generation[slot]
	return generation, mine
}

func (d *Device) awaitSlotFree(ctx context.Context, slot int) error {
	for delay := minPoll; ; delay = min(2*delay, maxPoll) {
		free, err := d.slotFree(slot)
		if err != nil || free {
			return err
		}
		if err := d.pause(ctx, delay); err != nil {
			return err
		}
	}
}

// slotFree tells whether no other open file description has the slot's lock. On a
// block device no other is open for writing.
func (d *Device) slotFree(slot int) (bool, error) {
	if d.blockDev {
		return true, nil
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK, Start: slotLockBase + int64(slot), Len: 1}
	_, err := retryEINTR(func() (int, error) { return 0, unix.FcntlFlock(uintptr(d.fd), unix.F_OFD_GETLK, &lock) })
	if err != nil {
		return false, fmt.Errorf("filedev: query the lock of slot %d of %s: %w", slot, d.path, err)
	}
	return lock.Type == unix.F_UNLCK, nil
}

// kill sends SIGKILL to p and to nobody else: the pidfd is taken first, so that
// it pins the process whose start time is then compared. An error tells why
// nothing was sent.
func kill(p block.Process) error {
	self, err := Self()
	if err != nil {
		return err
	}
	switch {
	case p.BootID != self.BootID:
		return errors.New("the holder is of another boot")
	case p.PIDNS != self.PIDNS:
		return errors.New("the holder is in another pid namespace")
	case p.PID == self.PID:
		return errors.New("the holder has the pid of this process")
	}
	pidfd, err := retryEINTR(func() (int, error) { return unix.PidfdOpen(int(p.PID), 0) })
	if err != nil {
		return fmt.Errorf("process %d cannot be opened: %w", p.PID, err)
	}
	defer unix.Close(pidfd)
	ticks, err := startTicks(int(p.PID))
	if err != nil {
		return err
	}
	if ticks != p.StartTicks {
		return fmt.Errorf("process %d started at tick %d, the holder at %d", p.PID, ticks, p.StartTicks)
	}
	err = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
	if err != nil && !errors.Is(err, unix.ESRCH) { // ESRCH: it died by itself just now
		return fmt.Errorf("process %d cannot be killed: %w", p.PID, err)
	}
	return nil
}
