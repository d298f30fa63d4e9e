package vmfs

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"time"

	"basalt/block"
	"basalt/block/unit"
)

const (
	headerMagic  = 0x52444842 // "BHDR"
	payloadOff   = 512
	maxIntents   = 64
	MaxPayload   = HeaderBytes - payloadOff // 11,776 bytes
	headerFields = 96                       // before the intents
)

// Header is an object's header record, kept twice, as A and B; the valid one of
// the current incarnation with the higher Sequence counts, and the other one is
// overwritten next. Integers are little-endian.
//
//	off   size  field
//	  0      4  CRC              CRC-32C over volume id, own address (u64), bytes [4,12288)
//	  4      4  Magic            "BHDR"
//	  8      8  Sequence         one more at every header write
//	 16      8  LockGeneration   of the lock under which it was written
//	 24      4  Self.Slot
//	 28      2  Self.Incarnation
//	 30      1  Kind
//	 31      1  reserved
//	 32      8  SizeBytes        of a file or disk
//	 40      8  Created          Unix time, nanoseconds
//	 48      8  Modified         Unix time, nanoseconds
//	 56      4  Origin.Slot      a clone's published snapshot; a published snapshot's disk
//	 60      2  Origin.Incarnation; 0: none
//	 62      2  number of intents, 0..64
//	 64     16  OriginUUID       of the snapshot that a clone or published snapshot shows
//	 80      4  payload length, 0..11776
//	 84     12  reserved
//	 96    256  intents          owner-table units in which a claim or release is going on (R2)
//	352    160  reserved         zero
//	512  11776  payload          the folder's or file's content or map; a disk engine's own header
type Header struct {
	Sequence       uint64
	LockGeneration uint64
	Self           Ref
	Kind           Kind
	SizeBytes      int64
	Created        time.Time
	Modified       time.Time
	Origin         Ref
	OriginUUID     [16]byte
	Intents        []uint32
	Payload        []byte
}

// Encode writes the record for the copy at offBytes into b, HeaderBytes long and
// zeroed.
func (h *Header) Encode(b []byte, volume [16]byte, offBytes int64) {
	le := binary.LittleEndian
	le.PutUint32(b[4:], headerMagic)
	le.PutUint64(b[8:], h.Sequence)
	le.PutUint64(b[16:], h.LockGeneration)
	le.PutUint32(b[24:], h.Self.Slot)
	le.PutUint16(b[28:], h.Self.Incarnation)
	b[30] = byte(h.Kind)
	le.PutUint64(b[32:], uint64(h.SizeBytes))
	le.PutUint64(b[40:], uint64(h.Created.UnixNano()))
	le.PutUint64(b[48:], uint64(h.Modified.UnixNano()))
	le.PutUint32(b[56:], h.Origin.Slot)
	le.PutUint16(b[60:], h.Origin.Incarnation)
	le.PutUint16(b[62:], uint16(len(h.Intents)))
	copy(b[64:80], h.OriginUUID[:])
	le.PutUint32(b[80:], uint32(len(h.Payload)))
	for i, u := range h.Intents {
		le.PutUint32(b[headerFields+4*i:], u)
	}
	copy(b[payloadOff:], h.Payload)
	le.PutUint32(b, crc32.Update(unit.Seed(volume, offBytes), unit.Castagnoli, b[4:HeaderBytes]))
}

// DecodeHeader checks the copy b that was read at offBytes.
func DecodeHeader(b []byte, volume [16]byte, offBytes int64) (*Header, error) {
	bad := func(format string, args ...any) error {
		return &block.CorruptError{Object: "object header", OffBytes: offBytes, Reason: fmt.Sprintf(format, args...)}
	}
	if len(b) < HeaderBytes {
		return nil, bad("%d bytes are too few", len(b))
	}
	le := binary.LittleEndian
	if got, want := le.Uint32(b), crc32.Update(unit.Seed(volume, offBytes), unit.Castagnoli, b[4:HeaderBytes]); got != want {
		return nil, bad("checksum %08x, computed %08x", got, want)
	}
	h := &Header{
		Sequence:       le.Uint64(b[8:]),
		LockGeneration: le.Uint64(b[16:]),
		Self:           Ref{le.Uint32(b[24:]), le.Uint16(b[28:])},
		Kind:           Kind(b[30]),
		SizeBytes:      int64(le.Uint64(b[32:])),
		Created:        time.Unix(0, int64(le.Uint64(b[40:]))),
		Modified:       time.Unix(0, int64(le.Uint64(b[48:]))),
		Origin:         Ref{le.Uint32(b[56:]), le.Uint16(b[60:])},
	}
	copy(h.OriginUUID[:], b[64:80])
	intents, payload := int(le.Uint16(b[62:])), int64(le.Uint32(b[80:]))
	switch {
	case le.Uint32(b[4:]) != headerMagic:
		return nil, bad("magic %08x", le.Uint32(b[4:]))
	case h.Self.Slot >= MaxObjects || h.Origin.Slot >= MaxObjects:
		return nil, bad("names an object slot out of range")
	case h.SizeBytes < 0:
		return nil, bad("negative size")
	case intents > maxIntents:
		return nil, bad("%d intents", intents)
	case payload > MaxPayload:
		return nil, bad("payload of %d bytes", payload)
	case !isZero(b[headerFields+4*intents:payloadOff]) || !isZero(b[payloadOff+payload:HeaderBytes]):
		return nil, bad("content beyond %d intents and %d bytes of payload", intents, payload)
	case b[31] != 0 || !isZero(b[84:headerFields]):
		return nil, bad("reserved bytes are not zero")
	}
	for i := range intents {
		h.Intents = append(h.Intents, le.Uint32(b[headerFields+4*i:]))
	}
	h.Payload = b[payloadOff : payloadOff+payload : payloadOff+payload]
	return h, nil
}
