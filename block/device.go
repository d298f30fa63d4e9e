// Package block is the seam between storage engines and storage devices: the
// Device that everything durable goes through, the Fencer that cuts a lost host
// off from it, and the errors both speak.
//
// It holds no implementation. block/filedev serves files and block devices,
// block/simdev simulates a shared LUN, block/faultdev injects faults, and
// block/blocktest is the conformance suite that all of them pass.
package block

import (
	"context"
)

// Device is a random-access store of SizeBytes bytes that several hosts may
// share. Offsets and lengths are in bytes and are multiples of
// Geometry.LogicalBytes. Memory may have any alignment; buffers from
// AlignedBuffer avoid a copy on devices that transfer by DMA.
//
// Transfers are whole: a nil error means that every byte was moved. There is no
// order between two operations that are in progress at the same time. An
// operation that returned an error, ctx.Err() included, may still have reached
// the media, wholly or in part, or may reach it later.
//
// A device has a volatile write cache: a completed WriteAt is visible to every
// later read by every host, but survives a power failure only after a Flush that
// began after the write completed, or when it was a WriteFUA or a
// CompareAndWrite. A write may be torn at LogicalBytes by a power failure, never
// within one logical block. Killing the process loses nothing that completed.
//
// All methods may be called at once from several goroutines.
type Device interface {
	// Geometry gives the device's fixed properties; only SizeBytes may grow
	// while the device is open.
	Geometry() Geometry

	// ReadAt fills p from offBytes.
	ReadAt(ctx context.Context, p []byte, offBytes int64) error

	// WriteAt writes p at offBytes into the device's cache.
	WriteAt(ctx context.Context, p []byte, offBytes int64) error

	// WriteFUA writes p at offBytes; p is on stable media when it returns nil.
	// It says nothing of earlier writes.
	WriteFUA(ctx context.Context, p []byte, offBytes int64) error

	// Flush makes every write that completed before the call durable. A failed
	// flush leaves those writes in doubt for good: a later success covers only
	// writes issued after the failure.
	Flush(ctx context.Context) error

	// WriteZeroes makes the range read as zeros, as WriteAt of zeros would. The
	// device may deallocate the range.
	WriteZeroes(ctx context.Context, offBytes, lenBytes int64) error

	// Discard tells that the range's content is no longer needed. What it reads
	// as afterwards is undefined. Devices without the ability return nil and do
	// nothing; Geometry.DiscardBytes is then 0.
	Discard(ctx context.Context, offBytes, lenBytes int64) error

	// CompareAndWrite atomically compares the len(compare) bytes at offBytes with
	// compare and, if they are equal, replaces them by write and makes that
	// durable (SBC-3 §5.2 COMPARE AND WRITE with FUA). The two have the same
	// length, Geometry.UnitBytes, and offBytes is a multiple of it. It returns
	// ErrMiscompare when the bytes differ, and ErrBusy when it could not begin, and
	// then has changed nothing. Any other error leaves the outcome open. It is atomic against every other
	// CompareAndWrite of the range by any host, if Geometry.SharedCAW is set, else
	// only within this Device.
	CompareAndWrite(ctx context.Context, offBytes int64, compare, write []byte) error

	// Close ends the device. It waits for operations in progress; later ones
	// return ErrClosed.
	Close() error
}

// Geometry describes a Device.
type Geometry struct {
	SizeBytes    int64
	LogicalBytes int   // smallest transfer and the tear unit: 512 or 4096
	UnitBytes    int   // length of a CompareAndWrite: 512 or 4096
	DiscardBytes int64 // granularity of Discard; 0 when it does nothing
	SharedCAW    bool  // CompareAndWrite excludes all hosts that can reach the device
}

// Range is a span of bytes on a device.
type Range struct {
	OffBytes, LenBytes int64
}

// Check returns ErrOutOfRange or ErrMisaligned when the span is not within a
// device of geometry g or not a whole number of logical blocks. A span may be
// empty.
func (g Geometry) Check(offBytes, lenBytes int64) error {
	l := int64(g.LogicalBytes)
	switch {
	case offBytes < 0 || lenBytes < 0 || offBytes > g.SizeBytes || lenBytes > g.SizeBytes-offBytes:
		return &RangeError{Err: ErrOutOfRange, OffBytes: offBytes, LenBytes: lenBytes, SizeBytes: g.SizeBytes}
	case offBytes%l != 0 || lenBytes%l != 0:
		return &RangeError{Err: ErrMisaligned, OffBytes: offBytes, LenBytes: lenBytes, SizeBytes: g.SizeBytes}
	}
	return nil
}

// CheckUnit returns an error when the arguments do not form one compare-and-write
// of a device of geometry g.
func (g Geometry) CheckUnit(offBytes int64, compare, write []byte) error {
	if len(compare) != g.UnitBytes || len(write) != g.UnitBytes || offBytes%int64(g.UnitBytes) != 0 {
		return &RangeError{Err: ErrMisaligned, OffBytes: offBytes, LenBytes: int64(len(write)), SizeBytes: g.SizeBytes}
	}
	return g.Check(offBytes, int64(len(write)))
}
