package vmfs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"time"

	"basalt/block"
	"basalt/block/unit"
	"basalt/lease"
)

// FormatVersion is the newest superblock version this package reads and writes.
const FormatVersion = 1

const superblockMagic = "BASALTFS"

// Feature bits that a mount must know.
const (
	IncompatDiskPaxos = 1 << 0 // kept for locks on devices without compare-and-write
	incompatKnown     = 0
	roCompatKnown     = 0
)

// Superblock describes a volume. It is kept in three copies; the one with the
// highest Sequence counts. Integers are little-endian.
//
//	off  size  field
//	  0     4  CRC           CRC-32C over zero id, own address (u64), bytes [4,4096)
//	  4     4  Version       FormatVersion
//	  8     8  Magic         "BASALTFS"
//	 16    16  Volume        id, never zero
//	 32     8  Sequence      volume generation: one more at every change
//	 40     8  SizeBytes     of the volume, whole MiB
//	 48     4  UnitBytes     512 or 4096
//	 52     4  LeaseMillis   lease length of its hosts
//	 56     8  Compat        feature bits that may be ignored
//	 64     8  ROCompat      feature bits that forbid writing when unknown
//	 72     8  Incompat      feature bits that forbid mounting when unknown
//	 80     4  MiddleGroup   group whose head slab holds the second copy
//	 84     4  reserved
//	 88     8  Created       Unix time, nanoseconds
//	 96     1  LabelLen      0..64
//	 97    64  Label         UTF-8
//	161  3935  reserved      zero; preserved
type Superblock struct {
	Volume      [16]byte
	Sequence    uint64
	SizeBytes   int64
	UnitBytes   int
	Lease       time.Duration
	Compat      uint64
	ROCompat    uint64
	Incompat    uint64
	MiddleGroup uint32
	Created     time.Time
	Label       string
}

// MaxLabelBytes is the longest label of a volume.
const MaxLabelBytes = 64

// Encode writes the record for a copy at offBytes into b, SuperblockBytes long.
func (s *Superblock) Encode(b []byte, offBytes int64) {
	le := binary.LittleEndian
	le.PutUint32(b[4:], FormatVersion)
	copy(b[8:16], superblockMagic)
	copy(b[16:32], s.Volume[:])
	le.PutUint64(b[32:], s.Sequence)
	le.PutUint64(b[40:], uint64(s.SizeBytes))
	le.PutUint32(b[48:], uint32(s.UnitBytes))
	le.PutUint32(b[52:], uint32(s.Lease/time.Millisecond))
	le.PutUint64(b[56:], s.Compat)
	le.PutUint64(b[64:], s.ROCompat)
	le.PutUint64(b[72:], s.Incompat)
	le.PutUint32(b[80:], s.MiddleGroup)
	le.PutUint64(b[88:], uint64(s.Created.UnixNano()))
	b[96] = byte(len(s.Label))
	clear(b[97 : 97+MaxLabelBytes])
	copy(b[97:], s.Label)
	le.PutUint32(b, superblockSum(b, offBytes))
}

func superblockSum(b []byte, offBytes int64) uint32 {
	return crc32.Update(unit.Seed([16]byte{}, offBytes), unit.Castagnoli, b[4:SuperblockBytes])
}

// DecodeSuperblock checks the copy b that was read at offBytes. ErrNotVolume: the
// magic is absent. ErrFormat: written by a later release; nothing else of it is
// judged. *block.CorruptError: anything else that is wrong.
func DecodeSuperblock(b []byte, offBytes int64) (*Superblock, error) {
	if len(b) < SuperblockBytes || string(b[8:16]) != superblockMagic {
		return nil, ErrNotVolume
	}
	le := binary.LittleEndian
	bad := func(format string, args ...any) error {
		return &block.CorruptError{Object: "superblock", OffBytes: offBytes, Reason: fmt.Sprintf(format, args...)}
	}
	if got, want := le.Uint32(b), superblockSum(b, offBytes); got != want {
		return nil, bad("checksum %08x, computed %08x", got, want)
	}
	if v := le.Uint32(b[4:]); v > FormatVersion {
		return nil, fmt.Errorf("%w: it is version %d, this program knows %d; use a newer basalt", ErrFormat, v, FormatVersion)
	}
	s := &Superblock{
		Sequence:    le.Uint64(b[32:]),
		SizeBytes:   int64(le.Uint64(b[40:])),
		UnitBytes:   int(le.Uint32(b[48:])),
		Lease:       time.Duration(le.Uint32(b[52:])) * time.Millisecond,
		Compat:      le.Uint64(b[56:]),
		ROCompat:    le.Uint64(b[64:]),
		Incompat:    le.Uint64(b[72:]),
		MiddleGroup: le.Uint32(b[80:]),
		Created:     time.Unix(0, int64(le.Uint64(b[88:]))),
	}
	copy(s.Volume[:], b[16:32])
	if unknown := s.Incompat &^ incompatKnown; unknown != 0 {
		return nil, fmt.Errorf("%w: it uses features %#x that this program does not know; use a newer basalt", ErrFormat, unknown)
	}
	switch {
	case le.Uint32(b[4:]) == 0:
		return nil, bad("version 0")
	case s.Volume == [16]byte{}:
		return nil, bad("volume id is zero")
	case s.SizeBytes < MinVolumeBytes || s.SizeBytes > MaxVolumeBytes || s.SizeBytes%mib != 0:
		return nil, bad("size of %d bytes", s.SizeBytes)
	case s.UnitBytes != 512 && s.UnitBytes != 4096:
		return nil, bad("unit of %d bytes", s.UnitBytes)
	case s.Lease < lease.MinLease || s.Lease > lease.MaxLease:
		return nil, bad("lease of %v", s.Lease)
	case int64(s.MiddleGroup) >= s.geometry().groups():
		return nil, bad("second copy in group %d of %d", s.MiddleGroup, s.geometry().groups())
	case b[96] > MaxLabelBytes || !isZero(b[97+int(b[96]):97+MaxLabelBytes]):
		return nil, bad("label of %d bytes", b[96])
	}
	s.Label = string(b[97 : 97+int(b[96])])
	return s, nil
}

// isZero tells whether the unused part of a record is as it should be: what a
// record does not say must not differ, or two records would say the same.
func isZero(b []byte) bool { return bytes.Count(b, []byte{0}) == len(b) }

func (s *Superblock) geometry() geometry {
	return geometry{sizeBytes: s.SizeBytes, unitBytes: s.UnitBytes}
}
