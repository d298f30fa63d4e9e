package filedev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"basalt/block"
)

// Polling of a lock that another process holds.
const (
	minPoll = 20 * time.Microsecond
	maxPoll = 5 * time.Millisecond
)

// CompareAndWrite locks the unit's bytes against the other processes, compares,
// and writes through. ErrBusy: another process, perhaps a frozen one, held the
// unit for Options.CAWWait; nothing was changed then.
func (d *Device) CompareAndWrite(ctx context.Context, offBytes int64, compare, write []byte) error {
	if err := d.beginWrite(ctx); err != nil {
		return err
	}
	defer d.end()
	if err := d.checkUnit(offBytes, compare, write); err != nil {
		return err
	}
	waitCtx, cancel := context.WithTimeout(ctx, d.opts.CAWWait)
	defer cancel()
	if err := d.units.lock(waitCtx, d.closing, offBytes); err != nil {
		return d.cawWaitError(ctx, offBytes, err)
	}
	defer d.units.unlock(offBytes)
	if !d.geo.SharedCAW {
		return d.compareAndWriteLocked(offBytes, compare, write)
	}
	if err := d.lockBytes(waitCtx, offBytes, int64(len(write))); err != nil {
		return d.cawWaitError(ctx, offBytes, err)
	}
	err := d.compareAndWriteLocked(offBytes, compare, write)
	if unlockErr := setLock(d.fd, unix.F_UNLCK, offBytes, int64(len(write))); unlockErr != nil {
		// Splitting a lock can lack memory. The unit then stays locked until Close.
		return errors.Join(err, fmt.Errorf("filedev: unlock the unit at %d of %s: %w", offBytes, d.path, unlockErr))
	}
	return err
}

func (d *Device) checkUnit(offBytes int64, compare, write []byte) error {
	err := d.geometry().CheckUnit(offBytes, compare, write)
	if errors.Is(err, block.ErrOutOfRange) {
		d.refreshSize()
		err = d.geometry().CheckUnit(offBytes, compare, write)
	}
	return err
}

// cawWaitError explains why the unit could not be locked; ctx is the caller's.
func (d *Device) cawWaitError(ctx context.Context, offBytes int64, err error) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("filedev: unit at %d of %s: %w: it was held for all of %v, perhaps by a frozen process", offBytes, d.path, block.ErrBusy, d.opts.CAWWait)
	default:
		return fmt.Errorf("filedev: lock the unit at %d of %s: %w", offBytes, d.path, err)
	}
}

func (d *Device) compareAndWriteLocked(offBytes int64, compare, write []byte) error {
	b, lent := d.bounce.get(len(compare))
	defer d.bounce.put(lent)
	if err := d.moveInPlace(reading, b, offBytes); err != nil {
		return err
	}
	if !bytes.Equal(b, compare) {
		return fmt.Errorf("filedev: unit at %d of %s: %w", offBytes, d.path, block.ErrMiscompare)
	}
	copy(b, write)
	return d.moveFUA(b, offBytes)
}

// lockBytes takes an OFD write lock, polling until ctx or the device ends.
func (d *Device) lockBytes(ctx context.Context, offBytes, lenBytes int64) error {
	for delay := minPoll; ; delay = min(2*delay, maxPoll) {
		err := setLock(d.fd, unix.F_WRLCK, offBytes, lenBytes)
		if !isLockHeld(err) {
			return err
		}
		if err := d.pause(ctx, delay); err != nil {
			return err
		}
	}
}

// pause waits between two polls.
func (d *Device) pause(ctx context.Context, delay time.Duration) error {
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-d.closing:
		return block.ErrClosed
	}
}

// setLock sets or clears an OFD lock without waiting.
func setLock(fd int, kind int16, offBytes, lenBytes int64) error {
	_, err := retryEINTR(func() (int, error) {
		return 0, unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Start: offBytes, Len: lenBytes})
	})
	return err
}

func isLockHeld(err error) bool {
	return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES)
}

// unitLocks excludes the goroutines of one Device from a unit, which its OFD lock
// cannot. It is exact, not striped, so that a unit held by a frozen process
// delays no other unit.
type unitLocks struct {
	mu   sync.Mutex // guards held
	held map[int64]chan struct{}
}

// lock waits until the unit at offBytes is free, ctx is done, or closing is closed.
func (l *unitLocks) lock(ctx context.Context, closing <-chan struct{}, offBytes int64) error {
	for {
		l.mu.Lock()
		freed, taken := l.held[offBytes]
		if !taken {
			if l.held == nil {
				l.held = make(map[int64]chan struct{})
			}
			l.held[offBytes] = make(chan struct{})
			l.mu.Unlock()
			return nil
		}
		l.mu.Unlock()
		select {
		case <-freed:
		case <-ctx.Done():
			return ctx.Err()
		case <-closing:
			return block.ErrClosed
		}
	}
}

func (l *unitLocks) unlock(offBytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.held[offBytes])
	delete(l.held, offBytes)
}
