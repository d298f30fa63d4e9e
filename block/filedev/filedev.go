// Package filedev serves a regular file or a block device of Linux as a
// block.Device, by direct I/O where the filesystem has it.
//
// A regular file on a local filesystem is a LUN that the processes of one kernel
// share: CompareAndWrite excludes them by an OFD lock on the unit's bytes, and the
// Device is a block.Fencer by an OFD lock on one byte for each slot (FenceOFD). On
// network and stacked filesystems a lock may not reach everyone who can write, so
// there is neither. A block device is opened exclusively: one writer for each
// kernel, CompareAndWrite atomic only within the Device.
//
// Invariants:
//   - One open file description carries every lock and every write, and it is
//     close-on-exec: while any write of a process can still land, its locks are
//     held, because the kernel drops them with the last reference, the one of
//     I/O in flight included. Nothing here may reopen or dup the descriptor.
//   - OFD locks do not exclude goroutines from each other; unitLocks does, and is
//     always taken first.
//   - All openers of one file should choose Options.Buffered alike: the kernel
//     keeps direct and buffered access coherent only by best effort.
//
// A context is looked at before an operation is submitted and while it waits for
// a lock, never during the transfer itself, which the kernel cannot interrupt.
//
// Lock order: Device.life (shared) > unitLocks > OFD lock > syncer.mu. life and
// syncer.mu are held across I/O on purpose; see there.
package filedev

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"basalt/block"
)

// maxFileBytes keeps data below the lock bytes of the slots.
const maxFileBytes = slotLockBase

// Options of Open. The zero value opens for writing, by direct I/O if possible.
type Options struct {
	ReadOnly bool // refuse changes with ErrNotSupported; a block device is then not opened exclusively
	Buffered bool // use the page cache even where direct I/O works

	// LogicalBytes is 512 or 4096; default: what the filesystem or the device
	// reports. It may not be smaller than that under direct I/O. A larger one is
	// for experiments: a power failure may then tear within a block.
	LogicalBytes int

	CAWWait   time.Duration // longest wait for a unit that another CompareAndWrite holds; default 10s
	FenceWait time.Duration // longest wait of Fence for a killed holder's lock to go; default 10s
}

func (o Options) withDefaults() (Options, error) {
	switch o.LogicalBytes {
	case 0, 512, 4096:
	default:
		return o, fmt.Errorf("filedev: LogicalBytes is %d, not 512 or 4096", o.LogicalBytes)
	}
	if o.CAWWait < 0 || o.FenceWait < 0 {
		return o, fmt.Errorf("filedev: negative wait: CAWWait %v, FenceWait %v", o.CAWWait, o.FenceWait)
	}
	if o.CAWWait == 0 {
		o.CAWWait = 10 * time.Second
	}
	if o.FenceWait == 0 {
		o.FenceWait = 10 * time.Second
	}
	return o, nil
}

// Device is an open file or block device. It implements block.Device and
// block.Fencer.
type Device struct {
	path     string
	opts     Options
	fd       int
	blockDev bool
	direct   bool
	memAlign uintptr // alignment in bytes that direct I/O needs of memory
	punches  bool    // regular file whose filesystem can punch holes
	geo      block.Geometry
	size     atomic.Int64 // SizeBytes; only grows

	bounce  bouncePool
	sync    syncer
	units   unitLocks
	guards  guards
	ending  atomic.Bool   // elects the one Close that does it
	closing chan struct{} // closed when Close begins; ends the waits for locks

	// life is held shared by each operation, across its I/O, so that Close can
	// wait for them; the descriptor must not be reused under a running transfer.
	life   sync.RWMutex // guards closed
	closed bool
}

// Create makes a sparse file of sizeBytes zeros, a positive multiple of 4096, and
// makes its existence durable. It never touches what exists: the error then
// matches fs.ErrExist.
func Create(path string, sizeBytes int64) (err error) {
	if sizeBytes <= 0 || sizeBytes%4096 != 0 || sizeBytes > maxFileBytes {
		return fmt.Errorf("filedev: create %s: size of %d bytes is not a positive multiple of 4096 up to %d: %w", path, sizeBytes, int64(maxFileBytes), block.ErrMisaligned)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("filedev: create: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("filedev: create: %w", mapErrno(err)), os.Remove(path))
		}
	}()
	err = f.Truncate(sizeBytes)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// Open opens an existing regular file or block device. The errors of a missing
// path match fs.ErrNotExist; a block device that is mounted or that someone else
// holds exclusively gives block.ErrBusy.
func Open(path string, opts Options) (*Device, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	d := &Device{path: path, opts: opts, closing: make(chan struct{})}
	if err := d.open(); err != nil {
		return nil, fmt.Errorf("filedev: open %s: %w", path, err)
	}
	if err := d.probe(); err != nil {
		unix.Close(d.fd)
		return nil, fmt.Errorf("filedev: open %s: %w", path, err)
	}
	d.sync.fd = d.fd
	return d, nil
}

func (d *Device) open() error {
	// The kind is needed before opening: O_EXCL means something on a block
	// device only, and opening a FIFO would block.
	var before, after unix.Stat_t
	if err := unix.Stat(d.path, &before); err != nil {
		return err
	}
	flags := unix.O_RDWR | unix.O_CLOEXEC
	if d.opts.ReadOnly {
		flags = unix.O_RDONLY | unix.O_CLOEXEC
	}
	switch before.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFBLK:
		d.blockDev = true
		if !d.opts.ReadOnly {
			flags |= unix.O_EXCL
		}
	default:
		return fmt.Errorf("neither a regular file nor a block device: %w", block.ErrNotSupported)
	}
	fd, err := retryEINTR(func() (int, error) { return unix.Open(d.path, flags, 0) })
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%w: mounted or exclusively open elsewhere: %w", block.ErrBusy, err)
	}
	if err != nil {
		return err
	}
	err = unix.Fstat(fd, &after)
	if err == nil && (after.Dev != before.Dev || after.Ino != before.Ino) {
		err = fmt.Errorf("replaced while it was opened: %w", fs.ErrNotExist)
	}
	if err != nil {
		unix.Close(fd)
		return err
	}
	d.fd = fd
	return nil
}

// Geometry gives the device's properties; a device that has grown shows it here.
// After Close it is what was known last.
func (d *Device) Geometry() block.Geometry {
	d.life.RLock()
	defer d.life.RUnlock()
	if !d.closed {
		d.refreshSize()
	}
	return d.geometry()
}

func (d *Device) geometry() block.Geometry {
	g := d.geo
	g.SizeBytes = d.size.Load()
	return g
}

// refreshSize takes over growth. A device that shrank keeps its size here, so
// that access to the lost part fails instead of seeming never to have existed.
func (d *Device) refreshSize() {
	now, err := sizeOf(d.fd, d.geo.LogicalBytes)
	if err != nil {
		return // the transfer that needs the size reports what is wrong
	}
	for {
		old := d.size.Load()
		if now <= old || d.size.CompareAndSwap(old, now) {
			return
		}
	}
}

// Close waits for operations in progress, except that it ends waits for locks
// with ErrClosed. It drops the guards of all slots.
func (d *Device) Close() error {
	if !d.ending.CompareAndSwap(false, true) {
		return fmt.Errorf("filedev: close %s: %w", d.path, block.ErrClosed)
	}
	close(d.closing)

	d.life.Lock()
	defer d.life.Unlock()
	d.closed = true
	if err := unix.Close(d.fd); err != nil {
		return fmt.Errorf("filedev: close %s: %w", d.path, err)
	}
	return nil
}

// begin admits an operation; the caller then holds life shared and must release
// it with end.
func (d *Device) begin(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	d.life.RLock()
	if d.closed {
		d.life.RUnlock()
		return fmt.Errorf("filedev: %s: %w", d.path, block.ErrClosed)
	}
	return nil
}

func (d *Device) end() { d.life.RUnlock() }

// beginWrite is begin for an operation that changes the device.
func (d *Device) beginWrite(ctx context.Context) error {
	if d.opts.ReadOnly {
		return fmt.Errorf("filedev: %s is open read-only: %w", d.path, block.ErrNotSupported)
	}
	return d.begin(ctx)
}

// check admits a span, after taking growth into account.
func (d *Device) check(offBytes, lenBytes int64) error {
	err := d.geometry().Check(offBytes, lenBytes)
	if errors.Is(err, block.ErrOutOfRange) {
		d.refreshSize()
		err = d.geometry().Check(offBytes, lenBytes)
	}
	return err
}

func retryEINTR(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// mapErrno turns what callers decide on into the errors of package block.
func mapErrno(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", block.ErrNoSpace, err)
	}
	return err
}
