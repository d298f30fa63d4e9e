package datastore

import (
	"context"
	"errors"
	"sync"

	"basalt/thinprov"
	"basalt/vmfs"
)

// shared is one disk's open instance.
type shared struct {
	path string // by which its first user opened it
	refs int    // users, and those who wait to become one; guarded by Datastore.mu

	mu         sync.Mutex // held while opening and closing; guards the rest
	users      int
	obj        *vmfs.Object
	disk       *thinprov.Disk
	publishing sync.Mutex // held while a snapshot becomes an object, or ends being one; after mu
	// resumed is closed when the deletion of a snapshot that a crash cut off has been
	// finished, or given up; stop gives it up.
	resumed chan struct{}
	stop    context.CancelFunc
}

// Disk is one user's access to an open disk. Close ends it. Offsets and lengths are
// in bytes, multiples of 512.
type Disk struct {
	engine *thinprov.Disk
	d      *Datastore
	ref    vmfs.Ref
	sh     *shared
}

// OpenDisk gives access to a disk; the first user in this process takes its lock,
// from a dead host if need be. A *vmfs.HeldError tells which live host has it.
func (d *Datastore) OpenDisk(ctx context.Context, path string) (*Disk, error) {
	info, err := d.lookupDisk(ctx, path)
	if err != nil {
		return nil, err
	}
	sh := d.enter(info.Ref, path)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if sh.users == 0 {
		if err := d.openShared(ctx, info.Ref, sh); err != nil {
			d.leave(info.Ref, sh)
			return nil, err
		}
	}
	sh.users++
	return &Disk{engine: sh.disk, d: d, ref: info.Ref, sh: sh}, nil
}

// enter finds or makes the entry of a disk and keeps it from being dropped.
func (d *Datastore) enter(ref vmfs.Ref, path string) *shared {
	d.mu.Lock()
	defer d.mu.Unlock()
	sh := d.disks[ref]
	if sh == nil {
		sh = &shared{path: path}
		d.disks[ref] = sh
	}
	sh.refs++
	return sh
}

// leave drops the entry after its last user or waiter.
func (d *Datastore) leave(ref vmfs.Ref, sh *shared) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if sh.refs--; sh.refs == 0 {
		delete(d.disks, ref)
	}
}

func (d *Datastore) openShared(ctx context.Context, ref vmfs.Ref, sh *shared) error {
	obj, err := d.vol.Open(ctx, ref, vmfs.LockExclusive, vmfs.NoWait)
	if err != nil {
		return err
	}
	disk, err := thinprov.Open(ctx, objectStore{d.vol, obj}, d.clk, d.log.With("disk", sh.path), thinprov.Options{BootID: d.boot})
	if err != nil {
		return errors.Join(err, obj.Close(ctx))
	}
	sh.obj, sh.disk, sh.resumed = obj, disk, make(chan struct{})
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	sh.stop = stop
	go func(resumed chan struct{}) {
		defer close(resumed)
		if err := disk.ResumeDeletion(background); err != nil && background.Err() == nil {
			d.log.Warn("a snapshot's deletion is not finished", "disk", sh.path, "error", err)
		}
	}(sh.resumed)
	return nil
}

// Close ends this user's access; the last one's writes the disk's state out and
// gives its lock up. Every operation through it has ended.
func (k *Disk) Close(ctx context.Context) error {
	k.sh.mu.Lock()
	defer k.sh.mu.Unlock()
	defer k.d.leave(k.ref, k.sh)
	k.sh.users--
	if k.sh.users > 0 {
		return nil
	}
	k.sh.stop()
	<-k.sh.resumed
	// When the disk cannot be closed cleanly its lock goes all the same: the next
	// opener recovers it as after a crash. All I/O under the lock has ended (R20).
	err := errors.Join(k.sh.disk.Close(ctx), k.sh.obj.Close(ctx))
	k.sh.disk, k.sh.obj = nil, nil
	return err
}

// openUsers tells how many have the disk open in this process.
func (d *Datastore) openUsers(ref vmfs.Ref) int {
	d.mu.Lock()
	sh := d.disks[ref]
	d.mu.Unlock()
	if sh == nil {
		return 0
	}
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return sh.users
}

// with runs f on the disk, opened for as long as f takes.
func (d *Datastore) with(ctx context.Context, path string, f func(*Disk) error) error {
	k, err := d.OpenDisk(ctx, path)
	if err != nil {
		return err
	}
	return errors.Join(f(k), k.Close(context.WithoutCancel(ctx)))
}

// vouched lets a success through only while this host's lease is valid.
func (d *Datastore) vouched(ctx context.Context, err error) error {
	if err != nil {
		return err
	}
	return d.vol.Session().Await(ctx)
}

// SizeBytes is the size that the guest sees.
func (k *Disk) SizeBytes() int64 { return k.engine.SizeBytes() }

// ReadAt fills p from offBytes; see thinprov.Disk, as for the other methods.
func (k *Disk) ReadAt(ctx context.Context, p []byte, offBytes int64) error {
	return k.d.vouched(ctx, k.engine.ReadAt(ctx, p, offBytes))
}

// WriteAt writes p at offBytes.
func (k *Disk) WriteAt(ctx context.Context, p []byte, offBytes int64) error {
	return k.d.vouched(ctx, k.engine.WriteAt(ctx, p, offBytes))
}

// WriteFUA writes p at offBytes, durably.
func (k *Disk) WriteFUA(ctx context.Context, p []byte, offBytes int64) error {
	return k.d.vouched(ctx, k.engine.WriteFUA(ctx, p, offBytes))
}

// Flush makes what completed before the call durable.
func (k *Disk) Flush(ctx context.Context) error { return k.d.vouched(ctx, k.engine.Flush(ctx)) }

// Discard unmaps a range.
func (k *Disk) Discard(ctx context.Context, offBytes, lenBytes int64) error {
	return k.d.vouched(ctx, k.engine.Discard(ctx, offBytes, lenBytes))
}

// WriteZeroes makes a range read as zeros.
func (k *Disk) WriteZeroes(ctx context.Context, offBytes, lenBytes int64) error {
	return k.d.vouched(ctx, k.engine.WriteZeroes(ctx, offBytes, lenBytes))
}

// Map tells which parts of a range are mapped. What it emitted counts only when it
// returns nil.
func (k *Disk) Map(ctx context.Context, offBytes, lenBytes int64, emit func(thinprov.Run) bool) error {
	return k.d.vouched(ctx, k.engine.Map(ctx, offBytes, lenBytes, emit))
}
