// Package datastore is one face for volumes and the disks on them: it joins the
// volume (vmfs) and the disk engine (thinprov), gives each disk one open instance
// however many use it, and knows how clones, snapshots and removals touch both.
//
// A disk's lock is taken when its first user opens it and dropped after its last.
//
// Lock order: Datastore.mu guards the table of disks and is never held across I/O;
// shared.mu is held while one disk is being opened or closed.
package datastore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"basalt/block"
	"basalt/internal/clock"
	"basalt/lease"
	"basalt/thinprov"
	"basalt/vmfs"
)

// Errors that callers decide on, beside those of vmfs and thinprov.
var (
	ErrNotDisk  = errors.New("datastore: not a disk")
	ErrDiskOpen = errors.New("datastore: disk is in use")
	ErrNoSnap   = errors.New("datastore: no such snapshot")
)

// Options are the settings of a mount.
type Options struct {
	HostName string
	HostID   [16]byte
	Process  block.Process
	Server   bool
	OnBreak  func(lease.BreakReport)
	Vouched  []string // hosts that a person says are down; see lease.Options
}

// Datastore is a volume that this process has mounted, or views.
type Datastore struct {
	vol  *vmfs.Volume
	clk  clock.Clock
	log  *slog.Logger
	boot [16]byte

	mu    sync.Mutex // guards disks
	disks map[vmfs.Ref]*shared
}

// shared is one disk's open instance.
type shared struct {
	path string

	mu    sync.Mutex // held while opening and closing; guards the rest
	users int
	obj   *vmfs.Object
	disk  *thinprov.Disk
	// resumed is closed when the deletion of a snapshot that a crash cut off has been
	// finished, or given up; stop gives it up.
	resumed chan struct{}
	stop    context.CancelFunc
}

// Mount joins the volume on dev as a host; see vmfs.Mount. It owns dev unless it
// fails.
func Mount(ctx context.Context, dev block.Device, fencer block.Fencer, clk clock.Clock, log *slog.Logger, opts Options) (*Datastore, error) {
	vol, err := vmfs.Mount(ctx, dev, fencer, clk, log, vmfs.MountOptions{
		HostName: opts.HostName, HostID: opts.HostID, Process: opts.Process, Server: opts.Server, OnBreak: opts.OnBreak, Vouched: opts.Vouched,
	})
	if err != nil {
		return nil, err
	}
	return &Datastore{vol: vol, clk: clk, log: log, boot: opts.Process.BootID, disks: map[vmfs.Ref]*shared{}}, nil
}

// View opens the volume for reading without a slot; see vmfs.View.
func View(ctx context.Context, dev block.Device, clk clock.Clock) (*Datastore, error) {
	vol, err := vmfs.View(ctx, dev, clk)
	if err != nil {
		return nil, err
	}
	return &Datastore{vol: vol, clk: clk, log: slog.New(slog.DiscardHandler), disks: map[vmfs.Ref]*shared{}}, nil
}

// Volume is the volume beneath.
func (d *Datastore) Volume() *vmfs.Volume { return d.vol }

// Close ends the mount. Every disk has been closed before.
func (d *Datastore) Close(ctx context.Context) error { return d.vol.Close(ctx) }

// lookupDisk finds a disk by its path.
func (d *Datastore) lookupDisk(ctx context.Context, path string) (vmfs.Info, error) {
	info, err := d.vol.Lookup(ctx, path)
	if err != nil {
		return vmfs.Info{}, err
	}
	if info.Kind != vmfs.KindDisk {
		return vmfs.Info{}, fmt.Errorf("%s: %w: it is a %v", path, ErrNotDisk, info.Kind)
	}
	return info, nil
}

// CreateDisk makes an empty thin disk of sizeBytes, a multiple of 512.
func (d *Datastore) CreateDisk(ctx context.Context, path string, sizeBytes int64) error {
	o, err := d.vol.Create(ctx, path, vmfs.New{
		Kind: vmfs.KindDisk, SizeBytes: sizeBytes,
		Init: func(ctx context.Context, o *vmfs.Object) error {
			return thinprov.Create(ctx, objectStore{d.vol, o}, d.clk, thinprov.CreateOptions{
				SizeBytes: sizeBytes, UUID: newUUID(), BootID: d.boot,
			})
		},
	})
	if err != nil {
		return err
	}
	return o.Close(ctx)
}

// newUUID draws a random UUID (RFC 9562 version 4).
func newUUID() [16]byte {
	var u [16]byte
	rand.Read(u[:]) // never fails (crypto/rand since Go 1.24)
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return u
}

// Disk is one user's access to an open disk. Close ends it.
type Disk struct {
	*thinprov.Disk
	d   *Datastore
	ref vmfs.Ref
	sh  *shared
}

// OpenDisk gives access to a disk; the first user in this process takes its lock,
// from a dead host if need be. A *vmfs.HeldError tells which live host has it.
func (d *Datastore) OpenDisk(ctx context.Context, path string) (*Disk, error) {
	info, err := d.lookupDisk(ctx, path)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	sh := d.disks[info.Ref]
	if sh == nil {
		sh = &shared{path: path}
		d.disks[info.Ref] = sh
	}
	d.mu.Unlock()

	sh.mu.Lock()
	defer sh.mu.Unlock()
	if sh.users == 0 {
		if err := d.openShared(ctx, info.Ref, sh); err != nil {
			return nil, err
		}
	}
	sh.users++
	return &Disk{Disk: sh.disk, d: d, ref: info.Ref, sh: sh}, nil
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

// settled waits until a deletion that a crash cut off is out of the way.
func (k *Disk) settled(ctx context.Context) error {
	select {
	case <-k.sh.resumed:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close ends this user's access; the last one's writes the disk's state out and
// gives its lock up. Every operation through it has ended.
func (k *Disk) Close(ctx context.Context) error {
	k.sh.mu.Lock()
	defer k.sh.mu.Unlock()
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

// inspect opens a disk for reading its metadata, without its lock.
func (d *Datastore) inspect(ctx context.Context, ref vmfs.Ref) (*thinprov.Disk, error) {
	o, err := d.vol.OpenView(ctx, ref)
	if err != nil {
		return nil, err
	}
	return thinprov.Open(ctx, objectStore{d.vol, o}, d.clk, d.log, thinprov.Options{})
}
