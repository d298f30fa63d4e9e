package thinprov

import (
	"context"
	"fmt"

	"basalt/thinprov/layout"
)

// unmapBlocks bounds the work of one log entry that unmaps.
const unmapBlocks = 1 << 16

var zeroBlock [BlockBytes]byte

// Discard gives up the content of a range, which then reads as zeros. It is durable
// when it returns nil.
func (d *Disk) Discard(ctx context.Context, offBytes, lenBytes int64) error {
	return d.unmap(ctx, offBytes, lenBytes)
}

// WriteZeroes makes a range read as zeros, by unmapping it. It is durable when it
// returns nil, except for parts of blocks that are zeroed in place.
func (d *Disk) WriteZeroes(ctx context.Context, offBytes, lenBytes int64) error {
	return d.unmap(ctx, offBytes, lenBytes)
}

func (d *Disk) unmap(ctx context.Context, offBytes, lenBytes int64) error {
	if err := d.begin(true); err != nil {
		return err
	}
	defer d.end()
	if err := checkRange(d.SizeBytes(), offBytes, lenBytes); err != nil || lenBytes == 0 {
		return err
	}
	end := offBytes + lenBytes
	held, err := d.lockRange(ctx, uint64(offBytes)/BlockBytes, blocksUp(end))
	if err != nil {
		return err
	}
	last, err := d.unmapHeld(ctx, offBytes, end, d.SizeBytes())
	return d.finish(ctx, held, last, err)
}

// unmapHeld zeroes the partial blocks at the edges, and unmaps the whole ones. The
// last block of a disk counts as whole even if the disk ends within it.
func (d *Disk) unmapHeld(ctx context.Context, off, end, size int64) (*batch, error) {
	lo, hi := blocksUp(off), uint64(end)/BlockBytes
	if end == size {
		hi = blocksUp(end)
	}
	var last *batch
	edge := func(from, to int64) error {
		if from >= to {
			return nil
		}
		b, err := d.zeroEdge(ctx, from, to)
		if b != nil {
			last = b
		}
		return err
	}
	if lo > hi {
		return last, firstOf(edge(off, end), nil)
	}
	if err := edge(off, int64(lo)*BlockBytes); err != nil {
		return last, err
	}
	if err := edge(int64(hi)*BlockBytes, end); err != nil {
		return last, err
	}
	for at := lo; at < hi; {
		b, to, err := d.unmapStep(ctx, at, min(at+unmapBlocks, hi))
		if b != nil {
			last = b
		}
		if err != nil {
			return last, fmt.Errorf("thinprov: unmap: %w", err)
		}
		at = to
	}
	return last, nil
}

// zeroEdge writes zeros over a part of a block, unless it is a hole.
func (d *Disk) zeroEdge(ctx context.Context, from, to int64) (*batch, error) {
	mapped := false
	err := d.rd.with(ctx, func() *mapHole {
		blk := uint64(from) / BlockBytes
		return d.head.Scan(blk, blk+1, func(layout.Extent) bool { mapped = true; return false })
	})
	if err != nil || !mapped {
		return nil, err
	}
	return d.writePart(ctx, zeroBlock[:to-from], from, d.putCached)
}

// unmapStep unmaps whole blocks from lo on, up to hi or the result, if any of them is
// mapped.
func (d *Disk) unmapStep(ctx context.Context, lo, hi uint64) (*batch, uint64, error) {
	to := hi
	b, err := d.change(ctx, rankChange, func() (layout.Entry, bool, error) {
		any, used := false, d.newTally()
		to = hi
		d.head.Scan(lo, hi, func(e layout.Extent) bool {
			if used.full() {
				to = e.Logical
				return false
			}
			any = true
			from := max(e.Logical, lo)
			used.add(e.Physical+(from-e.Logical), min(e.End(), hi)-from)
			return true
		})
		return layout.Entry{Kind: layout.EntryUnmap, Logical: lo, Length: to - lo}, any, nil
	}, func() *mapHole { return d.head.Need(lo, hi) })
	return b, to, err
}

// change logs one entry, as soon as there is room for it and for what it does to the
// trees. decide runs under mu when need finds no hole; it may say that there is
// nothing to do.
func (d *Disk) change(ctx context.Context, k rank, decide func() (layout.Entry, bool, error), need func() *mapHole) (*batch, error) {
	for {
		var b *batch
		missing := lackNothing
		var refused error
		err := d.rd.with(ctx, func() *mapHole {
			if d.failed != nil {
				refused = d.failed
				return nil
			}
			if h := need(); h != nil {
				return h
			}
			e, wanted, err := decide()
			if refused = err; err != nil || !wanted {
				return nil
			}
			n := recordBytes(maxEntryBytes + openEntryBytes)
			if missing = d.missingLocked(n, k); missing == lackNothing {
				d.ring.promised += n
				if b, refused = d.logLocked(e, n); b == nil {
					d.ring.promised -= n
				}
			}
			return nil
		})
		if err = firstOf(err, refused); err != nil || missing == lackNothing {
			return b, err
		}
		if err := d.provide(ctx, missing, k); err != nil {
			return nil, err
		}
	}
}

// maxEntryBytes is the length of the longest entry but a release: a snapshot with a
// long name, or a claim's list. A release fits beside it in one block too.
const maxEntryBytes = 8 + 8*layout.MaxReleasing
