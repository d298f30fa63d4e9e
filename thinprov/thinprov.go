// Package thinprov is the thin disk: it maps a virtual disk onto blocks that it
// allocates at first write, inside slabs that it claims from a Store. It keeps
// snapshots, and clones that start at a published snapshot. It does not know where
// slabs come from, who else lives on the volume, or who the guest is.
//
// A disk is a copy-on-write tree of extents, a log of the changes since the last
// checkpoint, and a table of the slabs it owns with the blocks used in each; see
// docs/format/disk.md. It is open for writing at most once: the Store's lock sees to
// that, and its generation is stamped into all that is written.
//
// Promises: a write that returned is in the device's cache, as with any disk; one
// that had to allocate, and every discard and snapshot, is durable. A Flush that
// returned nil makes all of them durable. A write that was in progress at a crash
// reads afterwards as old or new, block by block. Reads take no lock on a range: a
// read concurrent with a write may see it in part, and may see it shortly before it
// is durable; but what was read before a Flush is durable when that returns nil. What
// a snapshot shows never changes. After a failed flush, log write or checkpoint the disk refuses every
// change with ErrFailed until it is opened anew.
//
// Invariants:
//   - The log is appended in the order in which the changes are applied to the trees
//     in memory, so that replay repeats them.
//   - A map entry is logged only after the device's cache was flushed behind the
//     write of its data (R5), and a range stays locked until its entry is durable, so
//     that no overwrite in place can be acknowledged on a mapping that a crash undoes.
//   - A block is changed in place iff it is not foreign and was born after the epoch
//     of the head's parent snapshot; the same predicate says whether it is freed.
//   - A data block is reused only when the record that frees it is durable and all
//     I/O begun before has ended (R15). The block of a tree node that checkpoint N
//     replaced is reused only after checkpoint N+1 is durable (R14). A block to which
//     a write failed is neither reused nor changed in place before the disk is opened
//     anew, nor does a snapshot take it over, for that write may still land.
//   - No step of a deletion is applied before its beginning is durable: below the
//     cursor the head overwrites in place what was the snapshot's.
//   - The next checkpoint always finds room for its nodes, or a change is refused
//     beforehand; see rank.
//   - used bitmaps are what the trees reach; reserved and held blocks exist only in
//     memory.
//   - A slab leaves the disk in the order of rule R2.
//
// Assumption: when a disk is opened for writing, no write of an earlier opener, failed
// ones included, can take effect any more. The log goes on where it ended, and blocks
// that only the earlier opener knew of are given out again. See Store.LockGeneration.
//
// Lock order: a range of rangeLock, then Disk.claiming (one claim or release at a
// time), then Disk.mu; the turnstile of flushes stands alone. Disk.mu guards all
// state and is never held across Store I/O.
package thinprov

import (
	"context"
	"errors"

	"basalt/block"
	"basalt/thinprov/layout"
)

// Sizes that a Store and its users must know.
const (
	BlockBytes     = layout.BlockBytes
	SlabBytes      = layout.SlabBytes
	MaxHeaderBytes = 11 << 10 // a Store takes header payloads of up to this length
	MaxSizeBytes   = layout.MaxSizeBytes
	SectorBytes    = 512 // offsets and lengths of requests are multiples of it
)

// Errors that callers decide on.
var (
	// ErrNoSpace: the volume cannot give another slab. Nothing was lost; the request
	// may succeed later.
	ErrNoSpace = errors.New("thinprov: no space left on the volume")
	// ErrNoHeader: the object never had a header.
	ErrNoHeader = errors.New("thinprov: object has no header")
	// ErrReadOnly: the disk was opened without a lock generation, or has a feature
	// that this version may only read.
	ErrReadOnly = errors.New("thinprov: disk is open for reading only")
	// ErrClosed: the disk was closed.
	ErrClosed = errors.New("thinprov: disk is closed")
	// ErrFailed: an earlier flush, log write or checkpoint failed, so that the disk
	// cannot promise anything until it is opened anew.
	ErrFailed = errors.New("thinprov: disk refuses changes after a failed write")
	// ErrExists: the disk has a snapshot of that name or id.
	ErrExists = errors.New("thinprov: snapshot exists")
	// ErrNotFound: the disk has no such snapshot.
	ErrNotFound = errors.New("thinprov: no such snapshot")
	// ErrPublished: the snapshot is in use by clones or other hosts.
	ErrPublished = errors.New("thinprov: snapshot is published")
	// ErrBusy: a view of the snapshot is open, or another deletion is in progress.
	ErrBusy = errors.New("thinprov: snapshot is in use")
	// ErrLimit: the disk has as many snapshots as it may have.
	ErrLimit = errors.New("thinprov: too many snapshots")
	// ErrName: not a name for a snapshot.
	ErrName = errors.New("thinprov: not a valid snapshot name")
	// ErrShrink: a disk cannot be made shorter.
	ErrShrink = errors.New("thinprov: disk cannot shrink")
	// ErrStale: the disk was written under a newer lock generation than the store's.
	ErrStale = errors.New("thinprov: lock generation is older than the disk's")
)

// Ref names an object of the volume. The zero Ref means none.
type Ref = layout.Ref

// Purpose tells a Store what a claim is for.
type Purpose uint8

// Purposes of a claim.
const (
	PurposeData     Purpose = 1 // may not touch the volume's small reserve
	PurposeMetadata Purpose = 2 // may: it lets discards and deletes work on a full volume
)

// Plan is a claim that was prepared but has changed nothing yet.
type Plan struct {
	Units   []uint32 // owner-table units that Claim may change, at most 16
	Slabs   []int64  // byte addresses of slabs that were free; a hint for Claim
	Purpose Purpose
}

// MaxClaim is how many slabs are planned at most in one claim, MaxRelease how many
// are released at once.
const (
	MaxClaim   = layout.MaxClaimUnits
	MaxRelease = layout.MaxReleasing
)

// Store is an object that owns slabs of a volume, and its header. Addresses are
// bytes from the start of the volume's device. Data methods have the contracts of
// block.Device and may be called at once from several goroutines; PlanClaim, Claim,
// Settle, Release and WriteHeader never run at the same time as one another.
type Store interface {
	Volume() [16]byte
	Self() Ref
	// LockGeneration was raised by the compare-and-write that opened the object for
	// writing. It is 0 when the object is open for reading only. Whoever raises it has
	// made sure that nothing which earlier holders wrote takes effect any more: by a
	// fence, because the device answers a write only when it has ended, or by an
	// abort of the writes without an answer (as the end of a session does).
	LockGeneration() uint64
	// Geometry is that of the volume's device.
	Geometry() block.Geometry

	ReadAt(ctx context.Context, p []byte, offBytes int64) error
	WriteAt(ctx context.Context, p []byte, offBytes int64) error
	WriteFUA(ctx context.Context, p []byte, offBytes int64) error
	Flush(ctx context.Context) error
	Discard(ctx context.Context, offBytes, lenBytes int64) error

	// ReadHeader returns the newest payload that is intact, as it was written.
	// ErrNoHeader if there never was one.
	ReadHeader(ctx context.Context) ([]byte, error)
	// WriteHeader replaces the older of two copies, durably.
	WriteHeader(ctx context.Context, payload []byte) error

	// PlanClaim looks for up to n slabs, 1 ≤ n ≤ MaxClaim, and plans at least one. It
	// changes nothing on media. ErrNoSpace if there is none.
	PlanClaim(ctx context.Context, n int, purpose Purpose) (Plan, error)
	// Claim makes slabs the object's. They may be fewer or others than planned, but
	// lie in the plan's units. ErrNoSpace if none was left; any other error leaves
	// open what was claimed, until Settle.
	Claim(ctx context.Context, plan Plan) ([]int64, error)
	// Release gives slabs back. Those that are not the object's are left alone,
	// without an error.
	Release(ctx context.Context, slabs []int64) error
	// Settle makes sure that no earlier Claim or Release can still change the units
	// (R1), and returns the slabs in them that are the object's.
	Settle(ctx context.Context, units []uint32) ([]int64, error)
	// Unit is the owner-table unit that tells whose the slab is.
	Unit(slab int64) uint32
}
