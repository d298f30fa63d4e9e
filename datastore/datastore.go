// Package datastore is one face for volumes and the disks on them: it joins the
// volume (vmfs) and the disk engine (thinprov), gives each disk one open instance
// however many use it, and knows how clones, snapshots and removals touch both.
//
// A disk's lock is taken when its first user opens it and dropped after its last.
//
// Nothing is answered of a disk once its host's lease is in doubt, not even what
// needs no device operation: a hole's zeros, a flush of nothing.
//
// Lock order: shared.mu, held while one disk is being opened or closed, then
// Datastore.mu, which guards the table of disks and is never held across I/O.
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
	ErrNotDisk    = errors.New("datastore: not a disk")
	ErrDiskOpen   = errors.New("datastore: disk is in use")
	ErrNoSnapshot = errors.New("datastore: no such snapshot")
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

// inspect opens a disk for reading its metadata, without its lock.
func (d *Datastore) inspect(ctx context.Context, ref vmfs.Ref) (*thinprov.Disk, error) {
	o, err := d.vol.OpenView(ctx, ref)
	if err != nil {
		return nil, err
	}
	return thinprov.Open(ctx, objectStore{d.vol, o}, d.clk, d.log, thinprov.Options{})
}

// Rename moves an object to another name on the volume. It refuses a disk that is
// in use, and a folder above one: whoever uses a disk finds it by its path again
// when it reconnects, and must not find another. It waits for nobody.
func (d *Datastore) Rename(ctx context.Context, from, to string) (err error) {
	info, err := d.vol.Lookup(ctx, from)
	if err != nil {
		return err
	}
	disks := []vmfs.Ref{info.Ref}
	if info.Kind == vmfs.KindFolder {
		disks = nil
		if err := d.vol.Walk(ctx, info.Ref, func(_ string, in vmfs.Info) error {
			if in.Kind == vmfs.KindDisk {
				disks = append(disks, in.Ref)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	for _, ref := range disks {
		o, oerr := d.vol.Open(ctx, ref, vmfs.LockExclusive, vmfs.NoWait)
		if oerr != nil {
			return oerr
		}
		defer func() { err = errors.Join(err, o.Close(context.WithoutCancel(ctx))) }()
	}
	return d.vol.Rename(ctx, from, to)
}
