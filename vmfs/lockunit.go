package vmfs

import (
	"encoding/binary"
	"fmt"
	"time"

	"basalt/block/unit"
)

// LockMode is how an object is locked. The values are part of the format.
type LockMode uint8

// The lock modes. Multi-writer is held for disks that several hosts write at once.
const (
	LockFree LockMode = iota
	LockExclusive
	LockShared
	LockMultiWriter
)

func (m LockMode) String() string {
	switch m {
	case LockFree:
		return "free"
	case LockExclusive:
		return "exclusive"
	case LockShared:
		return "shared"
	case LockMultiWriter:
		return "multi-writer"
	}
	return fmt.Sprintf("lock mode %d", uint8(m))
}

// MaxSharedHolders is how many hosts can share one lock.
const MaxSharedHolders = 64

// Holder names one life of one host's slot.
type Holder struct {
	Slot       uint8
	Generation uint32
}

// LockRecord is the body of an object's lock unit (offsets from the unit's start).
//
//	off  size  field
//	 24     1  Mode
//	 25     1  Owner.Slot         when exclusive
//	 26     1  number of shared holders, 0..64
//	 27     1  Target.Slot        hand-over target
//	 28     4  Owner.Generation
//	 32     8  Generation         lock generation: one more at every acquisition
//	 40     4  Target.Generation  0: no hand-over is going on
//	 44     4  Want               what a waiter asks the owner for; see Want constants
//	 48     1  Waiter.Slot
//	 52     4  Waiter.Generation
//	 56     8  Since              Unix time of the acquisition, milliseconds
//	 64    64  slots of the shared holders
//	128   256  generations of the shared holders, u32 each
type LockRecord struct {
	Mode       LockMode
	Owner      Holder
	Target     Holder
	Generation uint64
	Want       uint32
	Waiter     Holder
	Since      time.Time
	Shared     []Holder
}

// WantRelease asks the owner to give the lock up as soon as it is not using it.
const WantRelease = 1 << 0

const lockBytes = 384

// Encode returns the body of the unit img with the record in it; what is reserved
// stays as it was in img.
func (l *LockRecord) Encode(img []byte) []byte {
	b := make([]byte, len(img))
	copy(b, img)
	le := binary.LittleEndian
	b[24], b[25], b[26], b[27] = byte(l.Mode), l.Owner.Slot, byte(len(l.Shared)), l.Target.Slot
	le.PutUint32(b[28:], l.Owner.Generation)
	le.PutUint64(b[32:], l.Generation)
	le.PutUint32(b[40:], l.Target.Generation)
	le.PutUint32(b[44:], l.Want)
	b[48] = l.Waiter.Slot
	le.PutUint32(b[52:], l.Waiter.Generation)
	le.PutUint64(b[56:], uint64(l.Since.UnixMilli()))
	clear(b[64:lockBytes])
	for i, h := range l.Shared {
		b[64+i] = h.Slot
		le.PutUint32(b[128+4*i:], h.Generation)
	}
	return b[unit.HeadBytes:]
}

// DecodeLock reads the body of a lock unit whose head has been checked.
func DecodeLock(p unit.Place, img []byte) (*LockRecord, error) {
	le := binary.LittleEndian
	if len(img) < lockBytes {
		return nil, corruptUnit(p, "%d bytes are too few", len(img))
	}
	l := &LockRecord{
		Mode:       LockMode(img[24]),
		Owner:      Holder{img[25], le.Uint32(img[28:])},
		Target:     Holder{img[27], le.Uint32(img[40:])},
		Generation: le.Uint64(img[32:]),
		Want:       le.Uint32(img[44:]),
		Waiter:     Holder{img[48], le.Uint32(img[52:])},
		Since:      time.UnixMilli(int64(le.Uint64(img[56:]))),
	}
	n := int(img[26])
	switch {
	case l.Mode > LockMultiWriter:
		return nil, corruptUnit(p, "mode %d", l.Mode)
	case n > MaxSharedHolders:
		return nil, corruptUnit(p, "%d shared holders", n)
	case !isZero(img[64+n:128]) || !isZero(img[128+4*n:lockBytes]):
		return nil, corruptUnit(p, "more than the %d shared holders that it counts", n)
	case l.Mode == LockShared && n == 0:
		return nil, corruptUnit(p, "shared by nobody")
	}
	for i := range n {
		l.Shared = append(l.Shared, Holder{img[64+i], le.Uint32(img[128+4*i:])})
	}
	return l, nil
}
