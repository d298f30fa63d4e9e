package filedev

import (
	"context"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"basalt/block"
)

// clearStepBytes is how much is discarded or zeroed in one system call, so that a
// context can end a long range in between.
const clearStepBytes = 1 << 30

// WriteZeroes punches a hole where the filesystem can, so that zeroing a full
// filesystem needs no space; a block device zeroes by its own means. Elsewhere
// zeros are written.
func (d *Device) WriteZeroes(ctx context.Context, offBytes, lenBytes int64) error {
	if err := d.beginWrite(ctx); err != nil {
		return err
	}
	defer d.end()
	if err := d.check(offBytes, lenBytes); err != nil {
		return err
	}
	return d.steps(ctx, offBytes, lenBytes, func(offBytes, lenBytes int64) error {
		var err error
		switch {
		case d.blockDev:
			err = blockRange(d.fd, unix.BLKZEROOUT, offBytes, lenBytes)
		case d.punches:
			err = punchHole(d.fd, offBytes, lenBytes)
		default:
			err = unix.EOPNOTSUPP
		}
		if errors.Is(err, unix.EOPNOTSUPP) {
			return d.writeZeros(ctx, offBytes, lenBytes)
		}
		if err != nil {
			return fmt.Errorf("filedev: zero %d bytes at %d of %s: %w", lenBytes, offBytes, d.path, mapErrno(err))
		}
		return nil
	})
}

// Discard gives the whole filesystem blocks of the range back.
func (d *Device) Discard(ctx context.Context, offBytes, lenBytes int64) error {
	if err := d.beginWrite(ctx); err != nil {
		return err
	}
	defer d.end()
	if err := d.check(offBytes, lenBytes); err != nil {
		return err
	}
	g := d.geo.DiscardBytes
	if g == 0 {
		return nil
	}
	if !d.blockDev { // the edges would be zeroed through the page cache, for nothing
		first, last := (offBytes+g-1)/g*g, (offBytes+lenBytes)/g*g
		offBytes, lenBytes = first, max(0, last-first)
	}
	return d.steps(ctx, offBytes, lenBytes, func(offBytes, lenBytes int64) error {
		var err error
		if d.blockDev {
			err = blockRange(d.fd, unix.BLKDISCARD, offBytes, lenBytes)
		} else {
			err = punchHole(d.fd, offBytes, lenBytes)
		}
		if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("filedev: discard %d bytes at %d of %s: %w", lenBytes, offBytes, d.path, mapErrno(err))
		}
		return nil
	})
}

func (d *Device) steps(ctx context.Context, offBytes, lenBytes int64, do func(offBytes, lenBytes int64) error) error {
	for lenBytes > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(lenBytes, clearStepBytes)
		if err := do(offBytes, n); err != nil {
			return err
		}
		offBytes, lenBytes = offBytes+n, lenBytes-n
	}
	return nil
}

func (d *Device) writeZeros(ctx context.Context, offBytes, lenBytes int64) error {
	zeros := block.AlignedBuffer(int(min(lenBytes, maxBounceBytes)))
	for lenBytes > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(lenBytes, int64(len(zeros)))
		if err := d.moveInPlace(writing, zeros[:n], offBytes); err != nil {
			return err
		}
		offBytes, lenBytes = offBytes+n, lenBytes-n
	}
	return nil
}

func punchHole(fd int, offBytes, lenBytes int64) error {
	_, err := retryEINTR(func() (int, error) {
		return 0, unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offBytes, lenBytes)
	})
	return err
}

// blockRange is BLKDISCARD or BLKZEROOUT; both take {offset, length} in bytes.
func blockRange(fd int, request uint, offBytes, lenBytes int64) error {
	span := [2]uint64{uint64(offBytes), uint64(lenBytes)}
	_, err := retryEINTR(func() (int, error) {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(&span)))
		if errno != 0 {
			return 0, errno
		}
		return 0, nil
	})
	return err
}
