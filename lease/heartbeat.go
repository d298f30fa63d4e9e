package lease

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"time"

	"basalt/block"
	"basalt/block/unit"
)

// Heartbeat is the record that a slot's owner, and nobody else, writes again and
// again. It is a sign of life only if its generation is the register's.
type Heartbeat struct {
	Generation uint32
	Sequence   uint64    // one more at every write of the generation
	Nonce      uint64    // random: two owners never write the same record
	WrittenAt  time.Time // wall clock of the owner, for people
}

// Offsets in the unit of a heartbeat (docs/format/lease.md §3).
//
//	off  size  field
//	  0     4  CRC          CRC-32C over volume id, own address (u64), then bytes [4,unit)
//	  4     4  Magic        "BHBT"
//	  8     4  Generation
//	 12     4  reserved     zero
//	 16     8  Sequence
//	 24     8  Nonce
//	 32     8  WrittenAt    Unix time in nanoseconds
//	 40   ...  reserved     zero
const (
	offBeatCRC        = 0
	offBeatMagic      = 4
	offBeatGeneration = 8
	offBeatSequence   = 16
	offBeatNonce      = 24
	offBeatWrittenAt  = 32

	// HeartbeatBytes is what a heartbeat takes of its unit.
	HeartbeatBytes = 40

	beatMagic = 0x54424842 // "BHBT"
)

// DecodeHeartbeat reads the heartbeat of a volume that lies at offBytes from a
// whole unit. The error is a *block.CorruptError.
func DecodeHeartbeat(b []byte, volume [16]byte, offBytes int64) (Heartbeat, error) {
	corrupt := func(format string, args ...any) error {
		return &block.CorruptError{Object: "heartbeat", OffBytes: offBytes, Reason: fmt.Sprintf(format, args...)}
	}
	if len(b) < HeartbeatBytes {
		return Heartbeat{}, corrupt("%d bytes are too few", len(b))
	}
	le := binary.LittleEndian
	if got, want := le.Uint32(b[offBeatCRC:]), beatSum(b, volume, offBytes); got != want {
		return Heartbeat{}, corrupt("checksum %08x, computed %08x", got, want)
	}
	if got := le.Uint32(b[offBeatMagic:]); got != beatMagic {
		return Heartbeat{}, corrupt("magic %08x", got)
	}
	return Heartbeat{
		Generation: le.Uint32(b[offBeatGeneration:]),
		Sequence:   le.Uint64(b[offBeatSequence:]),
		Nonce:      le.Uint64(b[offBeatNonce:]),
		WrittenAt:  getTime(b[offBeatWrittenAt:]),
	}, nil
}

// Encode writes the heartbeat of a volume that lies at offBytes into b, a whole
// unit.
func (h Heartbeat) Encode(b []byte, volume [16]byte, offBytes int64) {
	clear(b)
	le := binary.LittleEndian
	le.PutUint32(b[offBeatMagic:], beatMagic)
	le.PutUint32(b[offBeatGeneration:], h.Generation)
	le.PutUint64(b[offBeatSequence:], h.Sequence)
	le.PutUint64(b[offBeatNonce:], h.Nonce)
	putTime(b[offBeatWrittenAt:], h.WrittenAt)
	le.PutUint32(b[offBeatCRC:], beatSum(b, volume, offBytes))
}

func beatSum(b []byte, volume [16]byte, offBytes int64) uint32 {
	return crc32.Update(unit.Seed(volume, offBytes), unit.Castagnoli, b[offBeatMagic:])
}
