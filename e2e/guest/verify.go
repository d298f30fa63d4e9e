package guest

import (
	"errors"
	"fmt"
	"io"
)

// BadRecord is a block that does not hold what it must.
type BadRecord struct {
	Seq    uint64 // the record that should be there; 0: none
	Block  uint64
	Reason string
}

// maxBad bounds Report.Bad; further ones are only counted.
const maxBad = 16

// Report is what a disk proves.
type Report struct {
	Run    RunID  // zero when the disk holds no ring
	Blocks uint64 // length of the ring; 0 when the disk holds none
	// Last is the newest record present. It may exceed what the reader knows to be
	// acknowledged, for an acknowledgement may be lost on its way to a person.
	Last uint64
	// Torn: the block of record Last+1 is neither its old nor its new content. It
	// was in flight when the guest stopped, so this is no loss.
	Torn     bool
	BadCount uint64
	Bad      []BadRecord // the first few
}

// OK says that nothing acknowledged is missing.
func (r Report) OK() bool { return r.BadCount == 0 }

func (r *Report) bad(seq, block uint64, format string, args ...any) {
	r.BadCount++
	if len(r.Bad) < maxBad {
		r.Bad = append(r.Bad, BadRecord{Seq: seq, Block: block, Reason: fmt.Sprintf(format, args...)})
	}
}

// broken is a block without its ring's record: torn when it is no whole record
// at all, as a write that was cut short leaves it.
type broken struct {
	reason string
	torn   bool
}

// Verify reads the ring at the start of a disk and reports whether every record
// up to acked, and every older one than the newest present, is there: a newer
// record in its block is as good. Blocks of the ring that were not yet written
// must read as zeros. The error is of reading, never of content.
func Verify(r io.ReaderAt, acked uint64) (Report, error) {
	layout, run, err := findRing(r)
	if err != nil {
		return Report{}, err
	}
	var rep Report
	if layout.Blocks == 0 {
		if acked > 0 {
			rep.bad(1, 0, "no ring on the disk, but %d records were acknowledged", acked)
		}
		return rep, nil
	}
	rep.Run, rep.Blocks = run, layout.Blocks
	found := make([]uint64, layout.Blocks) // 0: zeros
	wrong := make(map[uint64]broken)
	buf := make([]byte, RecordBytes)
	for block := range layout.Blocks {
		rec, err := readRecord(r, buf, block)
		switch {
		case errors.Is(err, ErrEmpty):
		case errors.Is(err, ErrNoRecord):
			wrong[block] = broken{err.Error(), true}
		case err != nil:
			return Report{}, err
		case rec.Run != run:
			wrong[block] = broken{fmt.Sprintf("holds record %d of run %s", rec.Seq, rec.Run), false}
		case rec.Block != block || rec.Blocks != layout.Blocks:
			wrong[block] = broken{fmt.Sprintf("holds record %d of block %d in a ring of %d", rec.Seq, rec.Block, rec.Blocks), false}
		default:
			found[block] = rec.Seq
			rep.Last = max(rep.Last, rec.Seq)
		}
	}
	rep.judge(layout, acked, found, wrong)
	return rep, nil
}

func (r *Report) judge(layout Layout, acked uint64, found []uint64, wrong map[uint64]broken) {
	// Record Last was begun after Last-1 was acknowledged to the guest.
	must := max(acked, r.Last)
	inFlight := layout.BlockOf(r.Last + 1)
	for block, seq := range found {
		block := uint64(block)
		want := layout.SeqAt(block, must)
		b, isBroken := wrong[block]
		switch {
		case isBroken && b.torn && block == inFlight && acked <= r.Last:
			r.Torn = true
		case isBroken:
			r.bad(want, block, "%s", b.reason)
		case seq == 0 && want > 0:
			r.bad(want, block, "holds zeros")
		case seq < want:
			r.bad(want, block, "holds record %d", seq)
		}
	}
}

// findRing looks for the ring's shape in its first blocks. Several are tried,
// for one of them may be torn.
func findRing(r io.ReaderAt) (Layout, RunID, error) {
	buf := make([]byte, RecordBytes)
	for block := range uint64(MinBlocks / 2) {
		rec, err := readRecord(r, buf, block)
		switch {
		case err == nil:
			return Layout{Blocks: rec.Blocks}, rec.Run, nil
		case errors.Is(err, ErrEmpty), errors.Is(err, ErrNoRecord):
		default:
			return Layout{}, RunID{}, err
		}
	}
	return Layout{}, RunID{}, nil
}

func readRecord(r io.ReaderAt, buf []byte, block uint64) (Record, error) {
	// A ReaderAt may report EOF together with the last whole block.
	if n, err := r.ReadAt(buf, int64(block)*RecordBytes); n < len(buf) {
		if errors.Is(err, io.EOF) {
			return Record{}, fmt.Errorf("%w: the disk ends before block %d", ErrNoRecord, block)
		}
		return Record{}, fmt.Errorf("guest: read block %d: %w", block, err)
	}
	return DecodeRecord(buf)
}
