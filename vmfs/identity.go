package vmfs

import (
	"encoding/binary"
	"fmt"

	"basalt/block"
	"basalt/block/unit"
)

// Kind is what an object is. The values are part of the format.
type Kind uint8

// The kinds of objects.
const (
	KindNone     Kind = iota
	KindFile          // bytes, written whole
	KindFolder        // names
	KindDisk          // a thin disk; its header belongs to the disk engine
	KindSnapshot      // a published snapshot of a disk; has no folder entry, owns no slab
	KindVolume        // slot 0: its lock is the volume lock
)

func (k Kind) String() string {
	switch k {
	case KindNone:
		return "nothing"
	case KindFile:
		return "file"
	case KindFolder:
		return "folder"
	case KindDisk:
		return "disk"
	case KindSnapshot:
		return "snapshot"
	case KindVolume:
		return "volume"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// State is the life of an object slot. The values are part of the format.
type State uint8

// The states. A DYING object takes no new references and is on its way to FREE, or,
// while its creator is alive and has it locked, on its way to LIVE.
const (
	StateFree State = iota
	StateLive
	StateDying
)

func (s State) String() string {
	switch s {
	case StateFree:
		return "FREE"
	case StateLive:
		return "LIVE"
	case StateDying:
		return "DYING"
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// Pending is a change of a reference count whose actor has not confirmed it yet.
// The count beside it is the one without Child; see Identity.References.
type Pending struct {
	Delta int8 // +1 or -1; 0: none
	Child Ref
	Actor Holder
}

// MaxHolds is how many hosts can read one published snapshot at once.
const MaxHolds = 32

// Identity is the body of an object's identity unit: the truth of its name, and of
// who depends on it (offsets from the unit's start).
//
//	off  size  field
//	 24     1  State
//	 25     1  Kind
//	 26     2  Incarnation         of the life it is in or, when FREE, was in last
//	 28     4  Parent.Slot         folder of the name; a snapshot's disk
//	 32     2  Parent.Incarnation
//	 34     1  Pending.Delta       i8
//	 35     1  Pending.Actor.Slot
//	 36     4  Pending.Actor.Generation
//	 40     4  Pending.Child.Slot
//	 44     2  Pending.Child.Incarnation
//	 46     2  reserved
//	 48     4  Count               references, without Pending.Child
//	 52     1  number of holds, 0..32
//	 53     1  length of Name, 0..255
//	 56    32  slots of the holds
//	 88   128  generations of the holds, u32 each
//	216   255  Name
type Identity struct {
	State       State
	Kind        Kind
	Incarnation uint16
	Parent      Ref
	Pending     Pending
	Count       uint32
	Holds       []Holder
	Name        string
}

const identityBytes = 471

// Encode returns the body of the unit img with the record in it; what is reserved
// stays as it was in img.
func (id *Identity) Encode(img []byte) []byte {
	b := make([]byte, len(img))
	copy(b, img)
	le := binary.LittleEndian
	b[24], b[25] = byte(id.State), byte(id.Kind)
	le.PutUint16(b[26:], id.Incarnation)
	le.PutUint32(b[28:], id.Parent.Slot)
	le.PutUint16(b[32:], id.Parent.Incarnation)
	b[34], b[35] = byte(id.Pending.Delta), id.Pending.Actor.Slot
	le.PutUint32(b[36:], id.Pending.Actor.Generation)
	le.PutUint32(b[40:], id.Pending.Child.Slot)
	le.PutUint16(b[44:], id.Pending.Child.Incarnation)
	le.PutUint32(b[48:], id.Count)
	b[52], b[53] = byte(len(id.Holds)), byte(len(id.Name))
	clear(b[56:identityBytes])
	for i, h := range id.Holds {
		b[56+i] = h.Slot
		le.PutUint32(b[88+4*i:], h.Generation)
	}
	copy(b[216:], id.Name)
	return b[unit.HeadBytes:]
}

// DecodeIdentity reads the body of an identity unit whose head has been checked.
func DecodeIdentity(p unit.Place, img []byte) (*Identity, error) {
	le := binary.LittleEndian
	if len(img) < identityBytes {
		return nil, corruptUnit(p, "%d bytes are too few", len(img))
	}
	id := &Identity{
		State:       State(img[24]),
		Kind:        Kind(img[25]),
		Incarnation: le.Uint16(img[26:]),
		Parent:      Ref{le.Uint32(img[28:]), le.Uint16(img[32:])},
		Pending: Pending{
			Delta: int8(img[34]),
			Actor: Holder{img[35], le.Uint32(img[36:])},
			Child: Ref{le.Uint32(img[40:]), le.Uint16(img[44:])},
		},
		Count: le.Uint32(img[48:]),
		Name:  string(img[216 : 216+int(img[53])]),
	}
	n := int(img[52])
	if id.Name != "" {
		if err := CheckName(id.Name); err != nil {
			return nil, corruptUnit(p, "%v", err)
		}
	}
	switch {
	case id.State > StateDying:
		return nil, corruptUnit(p, "state %d", id.State)
	case id.Kind > KindVolume:
		return nil, corruptUnit(p, "kind %d", id.Kind)
	case id.Incarnation > MaxIncarnation || (id.Incarnation == 0 && id.State != StateFree):
		return nil, corruptUnit(p, "incarnation %d", id.Incarnation)
	case n > MaxHolds:
		return nil, corruptUnit(p, "%d holds", n)
	case !isZero(img[56+n:88]) || !isZero(img[88+4*n:216]):
		return nil, corruptUnit(p, "more than the %d holds that it counts", n)
	case !isZero(img[216+len(id.Name) : identityBytes]):
		return nil, corruptUnit(p, "a name longer than its %d bytes", len(id.Name))
	case id.Pending.Delta < -1 || id.Pending.Delta > 1:
		return nil, corruptUnit(p, "pending change of %d", id.Pending.Delta)
	case id.Parent.Slot >= MaxObjects || id.Pending.Child.Slot >= MaxObjects:
		return nil, corruptUnit(p, "names an object slot out of range")
	}
	for i := range n {
		id.Holds = append(id.Holds, Holder{img[56+i], le.Uint32(img[88+4*i:])})
	}
	return id, nil
}

func corruptUnit(p unit.Place, format string, args ...any) error {
	return &block.CorruptError{Object: p.Kind.String(), OffBytes: p.OffBytes, Reason: fmt.Sprintf(format, args...)}
}
