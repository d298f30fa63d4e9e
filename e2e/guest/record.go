package guest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
)

// RecordBytes is the length of a record and of a disk block.
const RecordBytes = 4096

const (
	offMagic  = 0
	offSeq    = 8
	offRun    = 16
	offBlock  = 32
	offBlocks = 40
	offFill   = 48
	offSum    = RecordBytes - sha256.Size
)

var (
	recordMagic = [8]byte{'B', 'A', 'S', 'A', 'L', 'T', 'G', 1}
	zeroRecord  [RecordBytes]byte
)

// Errors of DecodeRecord.
var (
	// ErrEmpty: the block is all zeros, as a block never written reads.
	ErrEmpty = errors.New("guest: block never written")
	// ErrNoRecord: the block is neither zeros nor a whole record.
	ErrNoRecord = errors.New("guest: not a record")
)

// RunID tells the rings of different runs apart.
type RunID [16]byte

// String is 32 lower-case hex digits.
func (id RunID) String() string { return hex.EncodeToString(id[:]) }

// ParseRunID reads 32 hex digits.
func ParseRunID(s string) (RunID, error) {
	var id RunID
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(id) {
		return id, fmt.Errorf("guest: run id %q is not 32 hex digits", s)
	}
	return RunID(b), nil
}

// Record is one block of a ring. Integers are little-endian.
//
//	off  size  field
//	  0     8  magic   "BASALTG\x01"
//	  8     8  Seq     counts from 1
//	 16    16  Run
//	 32     8  Block   own address in blocks from the start of the disk
//	 40     8  Blocks  length of the ring in blocks
//	 48  4016  fill    a stream that follows from Run and Seq
//	4064    32  sum     SHA-256 of bytes [0,4064)
type Record struct {
	Seq    uint64
	Run    RunID
	Block  uint64
	Blocks uint64
}

// EncodeInto fills b, which is RecordBytes long.
func (r Record) EncodeInto(b []byte) {
	b = b[:RecordBytes:RecordBytes]
	copy(b[offMagic:], recordMagic[:])
	binary.LittleEndian.PutUint64(b[offSeq:], r.Seq)
	copy(b[offRun:], r.Run[:])
	binary.LittleEndian.PutUint64(b[offBlock:], r.Block)
	binary.LittleEndian.PutUint64(b[offBlocks:], r.Blocks)
	r.fill(b[offFill:offSum])
	sum := sha256.Sum256(b[:offSum])
	copy(b[offSum:], sum[:])
}

// fill makes records of different Seq or Run differ in every 512-byte sector, so
// that a torn or misdirected sector never passes. splitmix64 is enough: the
// stream must differ, not be secret.
func (r Record) fill(b []byte) {
	state := binary.LittleEndian.Uint64(r.Run[:8]) ^ binary.LittleEndian.Uint64(r.Run[8:]) ^ r.Seq*0x9e3779b97f4a7c15
	for off := 0; off < len(b); off += 8 {
		state += 0x9e3779b97f4a7c15
		z := state
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		binary.LittleEndian.PutUint64(b[off:], z^z>>31)
	}
}

// DecodeRecord judges a block of RecordBytes: ErrEmpty for zeros, ErrNoRecord
// for anything that is not a whole record.
func DecodeRecord(b []byte) (Record, error) {
	if len(b) != RecordBytes {
		return Record{}, fmt.Errorf("%w: %d bytes", ErrNoRecord, len(b))
	}
	if !bytes.Equal(b[:len(recordMagic)], recordMagic[:]) {
		if bytes.Equal(b, zeroRecord[:]) {
			return Record{}, ErrEmpty
		}
		return Record{}, fmt.Errorf("%w: wrong magic", ErrNoRecord)
	}
	if sum := sha256.Sum256(b[:offSum]); !bytes.Equal(sum[:], b[offSum:]) {
		return Record{}, fmt.Errorf("%w: wrong checksum", ErrNoRecord)
	}
	r := Record{
		Seq:    binary.LittleEndian.Uint64(b[offSeq:]),
		Run:    RunID(b[offRun:offBlock]),
		Block:  binary.LittleEndian.Uint64(b[offBlock:]),
		Blocks: binary.LittleEndian.Uint64(b[offBlocks:]),
	}
	l := Layout{Blocks: r.Blocks}
	if err := l.Validate(); err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrNoRecord, err)
	}
	if r.Seq == 0 || l.BlockOf(r.Seq) != r.Block {
		return Record{}, fmt.Errorf("%w: record %d does not belong in block %d", ErrNoRecord, r.Seq, r.Block)
	}
	return r, nil
}
