// Package layout is the bytes of a thin disk: the header payload, tree nodes and
// their entries, log records and the payload of a published snapshot. It is pure:
// bytes in, values and errors out; docs/format/disk.md is the specification, and a
// test compares its tables with the constants here.
//
// Integers are little-endian. Addresses of tree nodes, extents and slabs are block
// numbers (4 KiB) or slab numbers (1 MiB), counted from the start of the volume's
// device. Every checksum is a CRC-32C that starts with the volume's id and the
// record's own address, so that a misdirected or foreign record never passes.
// Decoders accept any bytes: they return a *block.CorruptError and allocate nothing
// in proportion to an unchecked length. Reserved bytes are zero when written anew;
// of the header they are kept as they were read.
package layout

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"basalt/block"
	"basalt/block/unit"
)

// Sizes and limits of the format.
const (
	BlockBytes    = 4096
	SlabBytes     = 1 << 20
	BlocksPerSlab = SlabBytes / BlockBytes
	ChunkBlocks   = 16 // natural placement: 64 KiB

	MaxBlock     = 1<<40 - 1              // highest block number that an address can hold
	MaxSizeBytes = int64(62) << 40        // of a disk
	MaxKeys      = uint64(1) << 36        // logical blocks lie below it
	MaxLevel     = 12                     // of a tree node; leaves are level 0
	MaxSnapshots = 1000                   // of a disk
	MaxName      = 255                    // bytes of a snapshot's name
	FirstBlock   = SlabBytes / BlockBytes // the first slab of a device belongs to nobody
)

// Version is the only format version so far.
const Version = 1

// foreignBit marks, in an address, what belongs to another object.
const foreignBit = uint64(1) << 63

// Ref names an object of the volume. The zero Ref means none.
type Ref struct {
	Slot        uint32
	Incarnation uint16
}

// Seed is what a checksum starts with besides the address.
type Seed struct {
	Volume [16]byte
	Owner  Ref // whose disk it is; nodes reached through a foreign pointer belong to others
}

func (s Seed) sum(b []byte, offBytes int64) uint32 {
	return crc32.Update(unit.Seed(s.Volume, offBytes), unit.Castagnoli, b[4:])
}

func corrupt(object string, offBytes int64, format string, args ...any) error {
	return &block.CorruptError{Object: object, OffBytes: offBytes, Reason: fmt.Sprintf(format, args...)}
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

var le = binary.LittleEndian

// Pointer tells where a tree node lies and what it must contain to be believed.
//
//	off  size  field
//	  0     8  Key      low end of the child's range; 0 in a root pointer
//	  8     8  Block    bits 0..39 block number, bit 63 FOREIGN
//	 16     8  LockGen  first half of the child's version
//	 24     8  Seq      second half: sequence of the checkpoint that wrote it
//	 32     8  Birth    epoch of the youngest change below it
//	 40     4  CRC      the child's CRC field
//	 44     1  Level    of the child, 0..12
//	 45     3  reserved
//
// A pointer of zeros points nowhere.
type Pointer struct {
	Key, Block, LockGen, Seq, Birth uint64
	CRC                             uint32
	Level                           uint8
	Foreign                         bool
}

// PointerBytes is the length of an encoded Pointer.
const PointerBytes = 48

// IsNil reports whether p points nowhere.
func (p Pointer) IsNil() bool { return p.Block == 0 }

// Put encodes p into b.
func (p Pointer) Put(b []byte) {
	clear(b[:PointerBytes])
	le.PutUint64(b[0:], p.Key)
	le.PutUint64(b[8:], address(p.Block, p.Foreign))
	le.PutUint64(b[16:], p.LockGen)
	le.PutUint64(b[24:], p.Seq)
	le.PutUint64(b[32:], p.Birth)
	le.PutUint32(b[40:], p.CRC)
	b[44] = p.Level
}

// GetPointer decodes a pointer. A nil pointer decodes to the zero Pointer.
func GetPointer(b []byte) (Pointer, error) {
	blk, foreign, err := splitAddress(le.Uint64(b[8:]))
	if err != nil {
		if allZero(b[:PointerBytes]) {
			return Pointer{}, nil
		}
		return Pointer{}, err
	}
	p := Pointer{
		Key: le.Uint64(b[0:]), Block: blk, Foreign: foreign,
		LockGen: le.Uint64(b[16:]), Seq: le.Uint64(b[24:]), Birth: le.Uint64(b[32:]),
		CRC: le.Uint32(b[40:]), Level: b[44],
	}
	if p.Level > MaxLevel || !allZero(b[45:48]) {
		return Pointer{}, fmt.Errorf("pointer of level %d", p.Level)
	}
	return p, nil
}

func address(blk uint64, foreign bool) uint64 {
	if foreign {
		return blk | foreignBit
	}
	return blk
}

func splitAddress(v uint64) (blk uint64, foreign bool, err error) {
	blk, foreign = v&^foreignBit, v&foreignBit != 0
	if blk < FirstBlock || blk > MaxBlock {
		return 0, false, fmt.Errorf("block number %d is out of range", blk)
	}
	return blk, foreign, nil
}
