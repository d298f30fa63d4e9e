package vmfs

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"basalt/block"
	"basalt/block/unit"
	"basalt/internal/clock"
	"basalt/lease"
)

// Volume is one host's view of a volume: a mount, with a slot and a lease, or a
// reading view without either. All methods may be called at once.
type Volume struct {
	dev     block.Device   // through the gate when mounted
	session *lease.Session // nil for a view
	clk     clock.Clock
	log     *slog.Logger
	nonce   func() uint64
	sb      Superblock
	geo     geometry

	host    string
	locals  semaphores // object slots that this mount locks
	origins semaphores // object slots whose reference count this mount changes

	mu     sync.Mutex      // guards what follows
	cursor int64           // group at which the next claim starts to search
	slots  uint32          // object slot at which the next creation starts to search
	full   map[uint32]bool // owner-table units seen without a free tag since the last release
}

// MountOptions are a host's settings for one mount.
type MountOptions struct {
	HostName string        // names the host of the volume; required
	HostID   [16]byte      // of the machine; required
	Process  block.Process // this process, so that a frozen one can be killed
	Server   bool          // serves for long; two servers of one name are refused
	Nonce    func() uint64 // random numbers; default: the system's
	OnBreak  func(lease.BreakReport)
	Vouched  []string // hosts that a person says are down; see lease.Options
}

func areaOf(sb *Superblock) lease.Area {
	return lease.Area{Volume: sb.Volume, HeartbeatOff: HeartbeatOff, RegisterOff: RegisterOff, StrideBytes: StrideBytes, Slots: Slots}
}

// randomNonce draws from the system's generator.
func randomNonce() uint64 {
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic("vmfs: no randomness: " + err.Error()) // the kernel's generator does not fail
	}
	return binary.LittleEndian.Uint64(b[:])
}

// View opens the volume on dev for reading, without a slot and without locks: what
// it reads may be changing. It owns dev from then on.
func View(ctx context.Context, dev block.Device, clk clock.Clock) (*Volume, error) {
	found, err := readSuperblock(ctx, dev)
	if err != nil {
		return nil, err
	}
	return &Volume{
		dev: dev, clk: clk, log: slog.New(slog.DiscardHandler), sb: *found, geo: found.geometry(),
		nonce: randomNonce, full: map[uint32]bool{},
	}, nil
}

// Mount joins the volume on dev as a host: it proves compare-and-write, claims a
// slot and keeps its lease until Close. It owns dev, unless it fails.
func Mount(ctx context.Context, dev block.Device, fencer block.Fencer, clk clock.Clock, log *slog.Logger, opts MountOptions) (*Volume, error) {
	v, err := View(ctx, dev, clk)
	if err != nil {
		return nil, err
	}
	v.log, v.host = log, opts.HostName
	if opts.Nonce != nil {
		v.nonce = opts.Nonce
	}
	if err := v.prepare(ctx, dev, opts); err != nil {
		return nil, err
	}
	v.session, err = lease.Claim(ctx, dev, fencer, clk, log, areaOf(&v.sb), lease.Options{
		HostName: opts.HostName, HostID: opts.HostID, Process: opts.Process, Server: opts.Server,
		Lease: v.sb.Lease, Nonce: v.nonce, OnBreak: opts.OnBreak, Vouched: opts.Vouched,
	})
	if err != nil {
		return nil, err
	}
	v.dev = v.session.Device()
	// Hosts begin in different places, so that they seldom meet in one unit.
	v.cursor = int64(v.session.Slot()) * 7 % v.geo.groups()
	v.slots = uint32(v.session.Slot()) * 31
	return v, nil
}

// prepare refuses devices that cannot carry the mount.
func (v *Volume) prepare(ctx context.Context, dev block.Device, opts MountOptions) error {
	if err := CheckName(opts.HostName); err != nil {
		return fmt.Errorf("host name: %w", err)
	}
	if unknown := v.sb.ROCompat &^ roCompatKnown; unknown != 0 {
		return fmt.Errorf("%w: it uses features %#x, without which it can only be read; use a newer basalt", ErrFormat, unknown)
	}
	g := dev.Geometry()
	if g.UnitBytes != v.sb.UnitBytes {
		return fmt.Errorf("%w: the volume's units are %d bytes, the device compares and writes %d", ErrFormat, v.sb.UnitBytes, g.UnitBytes)
	}
	return v.selfTest(ctx, dev)
}

// Close ends the mount cleanly, its slot turns FREE, and closes the device. The
// caller has closed what it opened.
func (v *Volume) Close(ctx context.Context) error {
	if v.session == nil {
		return v.dev.Close()
	}
	return v.session.Close(ctx)
}

// Superblock returns the volume's description.
func (v *Volume) Superblock() Superblock { return v.sb }

// Session is the mount's slot and lease; nil for a view.
func (v *Volume) Session() *lease.Session { return v.session }

// Device is the device beneath, through the gate of the mount.
func (v *Volume) Device() block.Device { return v.dev }

// self is this mount as locks and pending changes name it.
func (v *Volume) self() Holder {
	return Holder{Slot: uint8(v.session.Slot()), Generation: v.session.Generation()}
}

func (v *Volume) place(kind unit.Kind, offBytes int64) unit.Place {
	return unit.Place{Volume: v.sb.Volume, OffBytes: offBytes, Kind: kind}
}

func (v *Volume) lockPlace(slot uint32) unit.Place {
	return v.place(unit.KindLock, objectOff(slot)+lockOff)
}

func (v *Volume) identityPlace(slot uint32) unit.Place {
	return v.place(unit.KindIdentity, objectOff(slot)+identityOff)
}

func (v *Volume) ownerPlace(u uint32) unit.Place {
	return v.place(unit.KindOwnerTable, v.geo.unitOff(u))
}

// change applies edit to the unit at p until one compare-and-write of it takes
// effect. edit gets the unit's current image and returns the new body, or an error
// to give up, or nil to leave the unit as it is. It returns the image that the
// unit ended with. After an ambiguous attempt edit may find its own change in place,
// and others' on top: it judges by its own entries (R1). A cancelled ctx ends the
// attempts, never a command that is under way.
func (v *Volume) change(ctx context.Context, p unit.Place, edit func(img []byte) ([]byte, error)) ([]byte, error) {
	img, _, err := p.Read(ctx, v.dev)
	if err != nil {
		return nil, err
	}
	return v.changeFrom(ctx, p, img, edit)
}

// changeFrom is change, beginning with an image that was read or written before.
func (v *Volume) changeFrom(ctx context.Context, p unit.Place, img []byte, edit func(img []byte) ([]byte, error)) ([]byte, error) {
	var err error
	for freed := false; err == nil; {
		body, eerr := edit(img)
		if eerr != nil || body == nil {
			return img, eerr
		}
		var r unit.Result
		r, err = p.Swap(context.WithoutCancel(ctx), v.dev, img, body, v.nonce)
		if errors.Is(err, block.ErrBusy) && !freed && v.session != nil {
			freed = true
			if err = v.breakSilent(ctx); err == nil {
				img, _, err = p.Read(ctx, v.dev)
			}
			continue
		}
		img = r.Image
		if err == nil {
			return img, nil
		}
		if errors.Is(err, unit.ErrConflict) || errors.Is(err, unit.ErrNotExecuted) {
			err = ctx.Err()
		}
	}
	return nil, err
}

// sleep waits for d on the volume's clock.
func (v *Volume) sleep(ctx context.Context, d time.Duration) error {
	t := v.clk.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// supersede raises the version of a unit without changing what it says, so that no
// compare-and-write that was on its way to it can take effect any more (R1). It
// does nothing when needed finds the unit in no need of it.
func (v *Volume) supersede(ctx context.Context, p unit.Place, needed func(img []byte) (bool, error)) ([]byte, error) {
	first := true
	return v.change(ctx, p, func(img []byte) ([]byte, error) {
		need, err := needed(img)
		if err != nil || !need || !first {
			return nil, err // not first: somebody else has raised it
		}
		first = false
		return bodyOf(img), nil
	})
}

func (v *Volume) volumePlace() unit.Place { return v.place(unit.KindVolume, VolumeUnitOff) }
