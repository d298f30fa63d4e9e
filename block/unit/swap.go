package unit

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"basalt/block"
)

var (
	// ErrConflict: the unit has changed since the image that Swap was given. The
	// change was not made, or (Result.Doubtful) it may have been made and changed
	// again: the caller judges the new image by its own entries.
	ErrConflict = errors.New("unit: changed by another")
	// ErrNotExecuted: the device did not execute the change, and it can no longer
	// take effect. The caller may try anew on Result.Image.
	ErrNotExecuted = errors.New("unit: compare-and-write was not executed")
)

// Result is a unit as Swap left or found it.
type Result struct {
	Image    []byte // whole unit, head included; nil when it could not be read
	Doubtful bool   // with ErrConflict: the change may have been in effect for a while
}

// readTries bounds how often Read reads a unit whose checksum is wrong: on a file in
// the page cache a read can see half of a compare-and-write.
const readTries = 4

// Read reads the unit at p and checks it.
func (p Place) Read(ctx context.Context, dev block.Device) ([]byte, Head, error) {
	img := block.AlignedBuffer(dev.Geometry().UnitBytes)
	var damage error
	for range readTries {
		if err := dev.ReadAt(ctx, img, p.OffBytes); err != nil {
			return nil, Head{}, fmt.Errorf("read %v at byte %d: %w", p.Kind, p.OffBytes, err)
		}
		h, err := p.Open(img)
		if err == nil {
			return img, h, nil
		}
		damage = err
	}
	return nil, Head{}, damage
}

// maxResolve bounds the attempts to learn the outcome of one ambiguous command.
const maxResolve = 16

// Swap replaces the unit whose image is old by one with the given body, one
// version higher, and returns the new image. The change is durable when the error
// is nil. nonce returns random numbers.
//
// ErrConflict and ErrNotExecuted are definite answers. Any other error means
// that the device could not be asked what became of the command: it may have
// taken effect, or may do so later.
func (p Place) Swap(ctx context.Context, dev block.Device, old, body []byte, nonce func() uint64) (Result, error) {
	h, err := p.Open(old)
	if err != nil {
		return Result{}, err
	}
	next := block.AlignedBuffer(len(old))
	copy(next[HeadBytes:], body)
	p.Seal(next, Head{Version: h.Version + 1, Nonce: nonce()})

	cause := dev.CompareAndWrite(ctx, p.OffBytes, old, next)
	if cause == nil {
		return Result{Image: next}, nil
	}
	if definite(cause) {
		return Result{}, fmt.Errorf("change %v at byte %d: %w", p.Kind, p.OffBytes, cause)
	}
	// A miscompare is resolved like an unknown outcome: a transport that repeats a
	// command whose reply it lost compares the second time with its own first.
	return p.resolve(ctx, dev, old, next, nonce, cause)
}

// definite tells the errors that a device returns before it issues anything.
func definite(err error) bool {
	return errors.Is(err, block.ErrNotSupported) || errors.Is(err, block.ErrOutOfRange) ||
		errors.Is(err, block.ErrMisaligned) || errors.Is(err, block.ErrClosed) || errors.Is(err, block.ErrFenced) || errors.Is(err, block.ErrBusy)
}

func (p Place) resolve(ctx context.Context, dev block.Device, old, next []byte, nonce func() uint64, cause error) (Result, error) {
	doubtful := !errors.Is(cause, block.ErrMiscompare)
	// ours are all images that this call has tried to put there.
	ours := [][]byte{next}
	for range maxResolve {
		img := block.AlignedBuffer(len(old))
		if err := dev.ReadAt(ctx, img, p.OffBytes); err != nil {
			if ctx.Err() != nil || definite(err) {
				return Result{}, fmt.Errorf("outcome of changing %v at byte %d is unknown (%w): read back: %w", p.Kind, p.OffBytes, cause, err)
			}
			continue
		}
		switch {
		case bytes.Equal(img, next):
			// It took effect. The command carried FUA, but its reply never said so.
			if err := dev.Flush(ctx); err != nil {
				return Result{}, fmt.Errorf("change %v at byte %d: flush: %w", p.Kind, p.OffBytes, err)
			}
			return Result{Image: img}, nil
		case !bytes.Equal(img, old):
			if _, err := p.Open(img); err != nil {
				return Result{}, err
			}
			if isOurs(img, ours) {
				return Result{Image: img}, fmt.Errorf("%v at byte %d: %w", p.Kind, p.OffBytes, ErrNotExecuted)
			}
			return Result{Image: img, Doubtful: doubtful}, fmt.Errorf("%v at byte %d: %w", p.Kind, p.OffBytes, ErrConflict)
		case !doubtful:
			// Miscompare, and yet the unit is what it was compared with: the device
			// contradicts itself, or the unit went away and came back, which versions
			// exclude.
			return Result{Image: img}, &block.CorruptError{Object: p.Kind.String(), OffBytes: p.OffBytes, Reason: "the device reports a miscompare with the content that it returns"}
		}
		// No effect so far, and the command may still be on its way: supersede it.
		again := block.AlignedBuffer(len(old))
		copy(again[HeadBytes:], old[HeadBytes:])
		h, err := p.Open(old)
		if err != nil {
			return Result{}, err
		}
		p.Seal(again, Head{Version: h.Version + 1, Nonce: nonce()})
		ours = append(ours, again)
		err = dev.CompareAndWrite(ctx, p.OffBytes, old, again)
		if err == nil {
			return Result{Image: again}, fmt.Errorf("%v at byte %d: %w", p.Kind, p.OffBytes, ErrNotExecuted)
		}
		if definite(err) || ctx.Err() != nil {
			return Result{}, fmt.Errorf("outcome of changing %v at byte %d is unknown (%w): %w", p.Kind, p.OffBytes, cause, err)
		}
	}
	return Result{}, fmt.Errorf("outcome of changing %v at byte %d is unknown: %w", p.Kind, p.OffBytes, cause)
}

func isOurs(img []byte, ours [][]byte) bool {
	for _, o := range ours {
		if bytes.Equal(img, o) {
			return true
		}
	}
	return false
}
