package filedev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"basalt/block"
)

// direction is what a transfer does.
type direction int

const (
	reading direction = iota
	writing
	writingFUA // with RWF_DSYNC; direct I/O only
)

func (d direction) String() string {
	switch d {
	case reading:
		return "read"
	case writing:
		return "write"
	case writingFUA:
		return "durable write"
	}
	panic(fmt.Sprintf("filedev: direction %d", int(d)))
}

// ReadAt fills p from offBytes. A device that ends before it should, truncated
// since it was opened, gives ErrOutOfRange.
func (d *Device) ReadAt(ctx context.Context, p []byte, offBytes int64) error {
	if err := d.begin(ctx); err != nil {
		return err
	}
	defer d.end()
	if err := d.check(offBytes, int64(len(p))); err != nil {
		return err
	}
	return d.move(reading, p, offBytes)
}

// WriteAt writes p at offBytes.
func (d *Device) WriteAt(ctx context.Context, p []byte, offBytes int64) error {
	if err := d.beginWrite(ctx); err != nil {
		return err
	}
	defer d.end()
	if err := d.check(offBytes, int64(len(p))); err != nil {
		return err
	}
	return d.move(writing, p, offBytes)
}

// WriteFUA writes p at offBytes and makes it durable. Its failure to do so counts
// as a failed flush, because the kernel reports an error of earlier writes only
// once, to whoever syncs first.
func (d *Device) WriteFUA(ctx context.Context, p []byte, offBytes int64) error {
	if err := d.beginWrite(ctx); err != nil {
		return err
	}
	defer d.end()
	if err := d.check(offBytes, int64(len(p))); err != nil {
		return err
	}
	return d.moveFUA(p, offBytes)
}

// Flush is sticky: after one failure all later ones fail, until the device is
// opened anew and its content judged by what is on it.
func (d *Device) Flush(ctx context.Context) error {
	if err := d.begin(ctx); err != nil {
		return err
	}
	defer d.end()
	if d.opts.ReadOnly {
		return nil
	}
	return d.flush()
}

func (d *Device) flush() error {
	if err := d.sync.flush(); err != nil {
		return fmt.Errorf("filedev: flush %s: %w", d.path, err)
	}
	return nil
}

func (d *Device) moveFUA(p []byte, offBytes int64) error {
	if len(p) == 0 {
		return nil
	}
	if !d.direct {
		// Two steps, so that a full filesystem, which one can wait out, is told
		// from a failed flush, which one cannot.
		if err := d.move(writing, p, offBytes); err != nil {
			return err
		}
		return d.flush()
	}
	err := d.move(writingFUA, p, offBytes)
	if err != nil && !errors.Is(err, block.ErrNoSpace) {
		d.sync.poison(err)
	}
	return err
}

// move transfers all of p, through a bounce buffer if its memory needs one.
func (d *Device) move(dir direction, p []byte, offBytes int64) error {
	if d.fits(p) {
		return d.moveInPlace(dir, p, offBytes)
	}
	for len(p) > 0 {
		n := min(len(p), maxBounceBytes)
		if err := d.moveBounced(dir, p[:n], offBytes); err != nil {
			return err
		}
		p, offBytes = p[n:], offBytes+int64(n)
	}
	return nil
}

func (d *Device) moveBounced(dir direction, p []byte, offBytes int64) error {
	b, lent := d.bounce.get(len(p))
	defer d.bounce.put(lent)
	if dir != reading {
		copy(b, p)
	}
	if err := d.moveInPlace(dir, b, offBytes); err != nil {
		return err
	}
	if dir == reading {
		copy(p, b)
	}
	return nil
}

func (d *Device) moveInPlace(dir direction, p []byte, offBytes int64) error {
	for done := 0; done < len(p); {
		n, err := d.transfer(dir, p[done:], offBytes+int64(done))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		n -= n % d.geo.LogicalBytes // a part of a block is moved again
		switch {
		case err != nil:
			err = mapErrno(err)
		case n > 0:
			done += n
			continue
		case dir == reading:
			err = fmt.Errorf("%w: it was truncated after it was opened", block.ErrOutOfRange)
		default:
			err = io.ErrShortWrite
		}
		return fmt.Errorf("filedev: %v %d bytes at %d of %s: %w", dir, len(p), offBytes, d.path, err)
	}
	return nil
}

func (d *Device) transfer(dir direction, p []byte, offBytes int64) (int, error) {
	switch dir {
	case reading:
		return unix.Pread(d.fd, p, offBytes)
	case writing:
		return unix.Pwrite(d.fd, p, offBytes)
	default:
		return unix.Pwritev2(d.fd, [][]byte{p}, offBytes, unix.RWF_DSYNC)
	}
}

// syncer makes one fdatasync serve all who wait for it, and remembers a failure.
//
// The calls are serialised: the kernel reports a failed write-back to one
// fdatasync only, so that of two at once the other would claim success.
type syncer struct {
	fd    int
	begun atomic.Uint64 // fdatasync calls that have begun

	mu     sync.Mutex // guards failed; held across fdatasync
	failed error
}

func (s *syncer) flush() error {
	need := s.begun.Load() + 1 // an fdatasync that begins from now on covers the caller's writes
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil {
		return s.failed
	}
	if s.begun.Load() >= need {
		return nil
	}
	s.begun.Add(1)
	if _, err := retryEINTR(func() (int, error) { return 0, unix.Fdatasync(s.fd) }); err != nil {
		s.failed = fmt.Errorf("earlier writes may be lost: %w", mapErrno(err))
	}
	return s.failed
}

// poison makes all later flushes fail.
func (s *syncer) poison(cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed == nil {
		s.failed = fmt.Errorf("earlier writes may be lost: %w", cause)
	}
}
