package block

import (
	"errors"
	"fmt"
)

// Errors that callers decide on. Devices wrap them with the place of the fault.
var (
	// ErrMiscompare: a CompareAndWrite found other bytes and changed nothing.
	ErrMiscompare = errors.New("block: compare-and-write found other content")
	// ErrOutOfRange: the span is not within the device.
	ErrOutOfRange = errors.New("block: beyond the end of the device")
	// ErrMisaligned: the span is not a whole number of logical blocks or units.
	ErrMisaligned = errors.New("block: not aligned to the device's blocks")
	// ErrNotSupported: the device or fencer cannot do this at all.
	ErrNotSupported = errors.New("block: not supported by this device")
	// ErrNoSpace: the storage beneath the device is full. Nothing says which part
	// of the write reached it.
	ErrNoSpace = errors.New("block: no space left beneath the device")
	// ErrClosed: the device was closed.
	ErrClosed = errors.New("block: device is closed")
	// ErrFenced: the device refuses this host for good (a fence took effect).
	ErrFenced = errors.New("block: this host is fenced from the device")
	// ErrBusy: someone else holds what was asked for and did not let go in time.
	ErrBusy = errors.New("block: held by another")
)

// RangeError tells which span was refused. It unwraps to ErrOutOfRange or
// ErrMisaligned.
type RangeError struct {
	Err                           error
	OffBytes, LenBytes, SizeBytes int64
}

func (e *RangeError) Error() string {
	return fmt.Sprintf("%v: %d bytes at %d of %d", e.Err, e.LenBytes, e.OffBytes, e.SizeBytes)
}

func (e *RangeError) Unwrap() error { return e.Err }

// CorruptError reports a record whose content cannot be trusted: a wrong CRC, a
// record of another volume or address, or fields out of range. It is damage,
// never "empty".
type CorruptError struct {
	Object   string // what should be there: "register 3", "tree node"
	OffBytes int64  // where, in bytes from the start of the device
	Reason   string
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("damaged %s at byte %d: %s", e.Object, e.OffBytes, e.Reason)
}
