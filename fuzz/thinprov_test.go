package fuzz_test

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"testing"

	"basalt/block/unit"
	"basalt/thinprov/cowtree"
	"basalt/thinprov/layout"
)

var thinVolume = [16]byte{0xba, 0x5a}

var thinSeed = layout.Seed{Volume: thinVolume, Owner: layout.Ref{Slot: 3, Incarnation: 4}}

// thinSeal gives a record the checksum that it needs to be looked at.
func thinSeal(b []byte, offBytes int64) {
	if len(b) >= 4 {
		binary.LittleEndian.PutUint32(b, crc32.Update(unit.Seed(thinVolume, offBytes), unit.Castagnoli, b[4:]))
	}
}

func thinHeader() []byte {
	b := make([]byte, layout.HeaderBytes)
	h := layout.Header{
		UUID: [16]byte{1}, SizeBytes: 1 << 30, Epoch: 5, Parent: 4, Checkpoint: 9, LockGen: 2, Self: thinSeed.Owner,
		Map:    layout.Pointer{Block: 900, LockGen: 1, Seq: 8, Birth: 5, CRC: 77, Level: 1},
		Mapped: 100, Own: 90, LogOff: 8192, LogSeq: 20, LogPrev: 5, Ring: []uint64{1, 2},
		ClaimKind: layout.SlabData, ClaimUnits: []uint32{0, 1}, Releasing: []uint64{9},
	}
	h.EncodeInto(thinVolume, b)
	return b
}

// FuzzThinHeader: a header that is accepted encodes to the same bytes.
func FuzzThinHeader(f *testing.F) {
	f.Add(thinHeader())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		b = bytes.Clone(b)
		thinSeal(b, 0)
		h, err := layout.DecodeHeader(thinVolume, b)
		if err != nil {
			return
		}
		again := bytes.Clone(b)
		h.EncodeInto(thinVolume, again)
		got, err := layout.DecodeHeader(thinVolume, again)
		if err != nil || got.SizeBytes != h.SizeBytes || got.Map != h.Map || len(got.Ring) != len(h.Ring) {
			t.Fatalf("%+v became %+v, %v", h, got, err)
		}
	})
}

// FuzzThinPublished: a payload that is accepted decodes equally after encoding.
func FuzzThinPublished(f *testing.F) {
	f.Add(layout.Published{UUID: [16]byte{1}, SizeBytes: 1 << 20, Epoch: 2, Root: layout.Pointer{Block: 800, Birth: 1}}.Encode(thinVolume))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = bytes.Clone(b)
		thinSeal(b, 0)
		p, err := layout.DecodePublished(thinVolume, b)
		if err != nil {
			return
		}
		if got, err := layout.DecodePublished(thinVolume, p.Encode(thinVolume)); err != nil || got != p {
			t.Fatalf("%+v became %+v, %v", p, got, err)
		}
	})
}

// FuzzThinRecord: a record, and each entry of it that is accepted, encodes to the
// same bytes.
func FuzzThinRecord(f *testing.F) {
	var entries []byte
	for _, e := range []layout.Entry{
		{Kind: layout.EntryMap, Logical: 5, Length: 3, Physical: 1030},
		{Kind: layout.EntryUnmap, Logical: 5, Length: 3},
		{Kind: layout.EntrySnapshot, Epoch: 2, Parent: 1, UUID: [16]byte{1}, Name: "monday"},
		{Kind: layout.EntryDeleteBegin, Epoch: 2},
		{Kind: layout.EntryDeleteStep, Epoch: 2, From: 0, To: 100},
		{Kind: layout.EntryDeleteEnd, Epoch: 2},
		{Kind: layout.EntryClaim, Slab: layout.SlabData, Units: []uint32{1, 2, 3}},
		{Kind: layout.EntryClaimed, Slab: layout.SlabData, Slabs: []uint64{4, 5}},
		{Kind: layout.EntryRelease, Slabs: []uint64{4}},
		{Kind: layout.EntryReleased},
		{Kind: layout.EntryPublish, Epoch: 2, Ref: layout.Ref{Slot: 1, Incarnation: 2}},
		{Kind: layout.EntryUnpublish, Epoch: 2},
		{Kind: layout.EntryResize, SizeBytes: 1 << 20},
		{Kind: layout.EntryOpen, UUID: [16]byte{3}},
	} {
		entries = e.Append(entries)
	}
	rec := make([]byte, layout.BlockBytes)
	copy(rec[layout.RecordHeadBytes:], entries)
	const at = 5 << 20
	thinSeed.SealRecord(rec, at, layout.RecordHead{LockGen: 1, Seq: 2, Used: len(entries)})
	f.Add(rec)
	f.Fuzz(func(t *testing.T, b []byte) {
		b = bytes.Clone(b)
		if n := layout.RecordLength(b); n == 0 || n != len(b) {
			return
		}
		thinSeal(b, at)
		h, _, err := thinSeed.OpenRecord(b, at)
		if err != nil {
			return
		}
		rest := b[layout.RecordHeadBytes : layout.RecordHeadBytes+h.Used]
		for len(rest) > 0 {
			e, next, err := layout.NextEntry(rest)
			if err != nil {
				return
			}
			if was := rest[:len(rest)-len(next)]; !bytes.Equal(e.Append(nil), was) && e.Kind != layout.EntryClaim && e.Kind != layout.EntryPublish {
				t.Fatalf("%+v was % x, became % x", e, was, e.Append(nil))
			}
			rest = next
		}
	})
}

var thinExtents = cowtree.Kind[layout.Extent]{
	ID: layout.TreeMap, Bytes: layout.ExtentBytes,
	Put: func(b []byte, e layout.Extent) { e.Put(b) }, Get: layout.GetExtent,
}

type thinSnapshot struct{ layout.Snapshot }

func (s thinSnapshot) Key() uint64 { return s.Epoch }
func (s thinSnapshot) End() uint64 { return s.Epoch + 1 }

var thinSnapshots = cowtree.Kind[thinSnapshot]{
	ID: layout.TreeSnapshots, Bytes: layout.SnapshotBytes,
	Put: func(b []byte, s thinSnapshot) { s.Put(b) },
	Get: func(b []byte) (thinSnapshot, error) {
		s, err := layout.GetSnapshot(b)
		return thinSnapshot{s}, err
	},
}

// thinNode decodes b as a node that its parent vouches for, and walks it.
func thinNode[E cowtree.Entry](t *testing.T, kind *cowtree.Kind[E], b []byte, level uint8) {
	const blk = 700
	count := int(binary.LittleEndian.Uint16(b[48:]))
	p := layout.Pointer{Block: blk, LockGen: 1, Seq: 2, Birth: 3, Level: level}
	p.CRC = thinSeed.SealNode(b, blk, layout.NodeHead{LockGen: 1, Seq: 2, Birth: 3, Owner: thinSeed.Owner, Kind: kind.ID, Level: level, Count: count})
	tree := cowtree.FromPointer[E](p)
	hole := tree.Need(0, cowtree.MaxKey)
	c, err := hole.Decode(kind, thinSeed, b)
	if err != nil {
		return
	}
	hole.Install(c)
	last := uint64(0)
	tree.Scan(0, cowtree.MaxKey, func(e E) bool {
		if e.Key() < last || e.End() <= e.Key() {
			t.Fatalf("entry %d to %d behind %d", e.Key(), e.End(), last)
		}
		last = e.End()
		return true
	})
}

// FuzzThinNode: an accepted node has entries in order, and can be walked.
func FuzzThinNode(f *testing.F) {
	leaf := make([]byte, layout.BlockBytes)
	binary.LittleEndian.PutUint16(leaf[48:], 2)
	layout.Extent{Logical: 3, Length: 2, Physical: 1030, Birth: 1}.Put(leaf[64:])
	layout.Extent{Logical: 9, Length: 1, Physical: 2030, Birth: 3}.Put(leaf[64+layout.ExtentBytes:])
	f.Add(leaf, uint8(0))
	inner := make([]byte, layout.BlockBytes)
	binary.LittleEndian.PutUint16(inner[48:], 2)
	layout.Pointer{Block: 901, Birth: 1}.Put(inner[64:])
	layout.Pointer{Key: 50, Block: 902, Birth: 2}.Put(inner[64+layout.PointerBytes:])
	f.Add(inner, uint8(1))
	table := make([]byte, layout.BlockBytes)
	binary.LittleEndian.PutUint16(table[48:], 1)
	layout.Snapshot{Epoch: 1, SizeBytes: 512, Name: "a"}.Put(table[64:])
	f.Add(table, uint8(0))
	f.Fuzz(func(t *testing.T, b []byte, level uint8) {
		if len(b) != layout.BlockBytes || level > layout.MaxLevel {
			return
		}
		thinNode(t, &thinExtents, bytes.Clone(b), level)
		thinNode(t, &thinSnapshots, bytes.Clone(b), level)
	})
}
