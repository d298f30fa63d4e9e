package guest_test

import (
	"bytes"
	"errors"
	"testing"

	"basalt/e2e/guest"
)

var testRun = guest.RunID{1, 2, 3}

func encoded(layout guest.Layout, seq uint64) []byte {
	b := make([]byte, guest.RecordBytes)
	guest.Record{Seq: seq, Run: testRun, Block: layout.BlockOf(seq), Blocks: layout.Blocks}.EncodeInto(b)
	return b
}

func TestRecordReadsBack(t *testing.T) {
	layout := guest.Layout{Blocks: 16}
	got, err := guest.DecodeRecord(encoded(layout, 23))
	if want := (guest.Record{Seq: 23, Run: testRun, Block: layout.BlockOf(23), Blocks: 16}); err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
}

func TestEveryChangedByteIsSeen(t *testing.T) {
	good := encoded(guest.Layout{Blocks: 16}, 5)
	for off := range good {
		bad := bytes.Clone(good)
		bad[off] ^= 0x10
		if _, err := guest.DecodeRecord(bad); !errors.Is(err, guest.ErrNoRecord) {
			t.Fatalf("byte %d changed: %v", off, err)
		}
	}
	if _, err := guest.DecodeRecord(make([]byte, guest.RecordBytes)); !errors.Is(err, guest.ErrEmpty) {
		t.Errorf("zeros: %v", err)
	}
	if _, err := guest.DecodeRecord(good[:512]); !errors.Is(err, guest.ErrNoRecord) {
		t.Errorf("a short block: %v", err)
	}
}

func TestSectorsOfDifferentRecordsDiffer(t *testing.T) {
	layout := guest.Layout{Blocks: 16}
	a, b := encoded(layout, 5), encoded(layout, 5+layout.Blocks) // the same block
	for off := 0; off < guest.RecordBytes; off += 512 {
		if bytes.Equal(a[off:off+512], b[off:off+512]) {
			t.Errorf("sector at %d is the same in both: a torn write would pass", off)
		}
	}
}

func TestAPassVisitsEachBlockOnce(t *testing.T) {
	for _, blocks := range []uint64{8, 10, 12, 14, 64, 1000, 4096, 5006} {
		layout := guest.Layout{Blocks: blocks}
		if err := layout.Validate(); err != nil {
			t.Fatal(err)
		}
		seen := make([]uint64, blocks) // newest record by block, the slow way
		for seq := uint64(1); seq <= 3*blocks; seq++ {
			block := layout.BlockOf(seq)
			if block >= blocks {
				t.Fatalf("ring of %d: record %d in block %d", blocks, seq, block)
			}
			seen[block] = seq
			if got := layout.SeqAt(block, seq); got != seq {
				t.Fatalf("ring of %d: SeqAt(%d, %d) = %d", blocks, block, seq, got)
			}
			if seq%blocks != 0 {
				continue
			}
			for b, want := range seen {
				if got := layout.SeqAt(uint64(b), seq); got != want {
					t.Fatalf("ring of %d after %d: block %d holds %d; SeqAt says %d", blocks, seq, b, want, got)
				}
			}
		}
	}
}

func TestHalfTheRecordsAreScattered(t *testing.T) {
	layout := guest.Layout{Blocks: 4096}
	near := 0
	for seq := uint64(2); seq < 4000; seq += 2 {
		if d := int64(layout.BlockOf(seq+2)) - int64(layout.BlockOf(seq)); d > -256 && d < 256 {
			near++
		}
	}
	if near > 0 {
		t.Errorf("%d successive even records lie within a MiB", near)
	}
}

func TestRingLengths(t *testing.T) {
	for _, blocks := range []uint64{0, 6, 9, guest.MaxBlocks + 2} {
		if err := (guest.Layout{Blocks: blocks}).Validate(); err == nil {
			t.Errorf("a ring of %d blocks is accepted", blocks)
		}
	}
}
