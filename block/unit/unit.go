// Package unit is the CAW-able record: the 24-byte head that every unit on a
// volume begins with, its checksum, and Swap, the one way to change a unit.
//
// A unit is Geometry.UnitBytes long (512 or 4096) and lies at a multiple of it.
//
//	off  size  field
//	  0     4  CRC      CRC-32C over volume id, own address (u64), then bytes [4,unit)
//	  4     4  Kind     what the unit is; see the Kind constants
//	  8     8  Version  one more at every change; never reused
//	 16     8  Nonce    random, fresh at every change: tells whose change it was
//	 24   ...  body     the owner's record, zero to the end of the unit
//
// Integers are little-endian. Because volume id and address are part of the
// checksum, a misdirected or foreign unit never passes. A failing checksum is
// damage; it never means "free".
//
// Swap follows rule R1 of the design: an ambiguous compare-and-write is judged by
// reading back, and when it had no effect it is superseded, so that a late
// command can no longer take effect. Nothing is ever retried blindly.
package unit

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"basalt/block"
)

// HeadBytes is the length of the head in front of a unit's body.
const HeadBytes = 24

// Kind tells what a unit holds. The values are part of the on-disk format.
type Kind uint32

// The kinds of units on a volume.
const (
	KindRegister   Kind = 0x47455242 // "BREG": a slot's register
	KindOwnerTable Kind = 0x574f5242 // "BROW": tags of a run of slabs
	KindLock       Kind = 0x4b4c5242 // "BRLK": an object's lock
	KindIdentity   Kind = 0x44495242 // "BRID": an object's identity
	KindVolume     Kind = 0x4c565242 // "BRVL": the volume's shared counters
	KindScratch    Kind = 0x43535242 // "BRSC": the mount self-test's playground
)

func (k Kind) String() string {
	switch k {
	case KindRegister:
		return "register"
	case KindOwnerTable:
		return "owner table unit"
	case KindLock:
		return "lock unit"
	case KindIdentity:
		return "identity unit"
	case KindVolume:
		return "volume unit"
	case KindScratch:
		return "scratch unit"
	}
	return fmt.Sprintf("unit of unknown kind %#x", uint32(k))
}

// Place names one unit of one volume: what belongs there and where it lies.
type Place struct {
	Volume   [16]byte
	OffBytes int64 // from the start of the device
	Kind     Kind
}

// Head is the decoded head of a unit.
type Head struct {
	Version uint64
	Nonce   uint64
}

// Castagnoli is the table of CRC-32C, the checksum of every record of a volume.
var Castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Seed starts the CRC-32C of a record of a volume at an address in bytes.
func Seed(volume [16]byte, offBytes int64) uint32 {
	var b [24]byte
	copy(b[:], volume[:])
	binary.LittleEndian.PutUint64(b[16:], uint64(offBytes))
	return crc32.Checksum(b[:], Castagnoli)
}

// Seal writes the head into b, whose body is already in place.
func (p Place) Seal(b []byte, h Head) {
	le := binary.LittleEndian
	le.PutUint32(b[4:], uint32(p.Kind))
	le.PutUint64(b[8:], h.Version)
	le.PutUint64(b[16:], h.Nonce)
	le.PutUint32(b, p.sum(b))
}

// Open checks b and returns its head. Its error is a *block.CorruptError.
func (p Place) Open(b []byte) (Head, error) {
	if len(b) < HeadBytes {
		return Head{}, p.corrupt("%d bytes are too few for a unit", len(b))
	}
	le := binary.LittleEndian
	if got, want := le.Uint32(b), p.sum(b); got != want {
		return Head{}, p.corrupt("checksum %08x, computed %08x", got, want)
	}
	if got := Kind(le.Uint32(b[4:])); got != p.Kind {
		return Head{}, p.corrupt("holds a %v", got)
	}
	return Head{Version: le.Uint64(b[8:]), Nonce: le.Uint64(b[16:])}, nil
}

func (p Place) sum(b []byte) uint32 {
	return crc32.Update(Seed(p.Volume, p.OffBytes), Castagnoli, b[4:])
}

func (p Place) corrupt(format string, args ...any) error {
	return &block.CorruptError{Object: p.Kind.String(), OffBytes: p.OffBytes, Reason: fmt.Sprintf(format, args...)}
}
