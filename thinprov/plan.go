package thinprov

import (
	"context"
	"errors"
	"fmt"

	"basalt/thinprov/layout"
)

// piece is a part of a write that goes to consecutive blocks.
type piece struct {
	segment
	fresh bool // newly allocated, not changed in place
}

// plan is how a part of a write will be done.
type plan struct {
	pieces            []piece
	fresh             int    // how many of them are
	firstOld, lastOld uint64 // where the first and last block lie now; 0 if nowhere
	promised          uint64 // of the ring, for the fresh pieces
	phase             uint64 // of pins
}

// add appends a piece, joining it with the one before where it continues that.
func (pl *plan) add(x piece) {
	if n := len(pl.pieces); n > 0 {
		last := &pl.pieces[n-1]
		if last.fresh == x.fresh && last.physical+last.count == x.physical {
			last.count += x.count
			return
		}
	}
	pl.pieces = append(pl.pieces, x)
	if x.fresh {
		pl.fresh++
	}
}

// lack is what a request is short of.
type lack uint8

const (
	lackNothing lack = iota
	lackBlocks       // a slab for data
	lackNodes        // free blocks for tree nodes
	lackLog          // room in the ring
)

// planWrite decides where the blocks [lo,hi) go, and reserves what must be
// allocated. It waits, or claims slabs, for what is missing.
func (d *Disk) planWrite(ctx context.Context, lo, hi uint64) (plan, error) {
	full := false // the volume gave nothing: take whatever block is free
	for waits := 0; ; {
		var pl plan
		var missing lack
		err := d.rd.with(ctx, func() *mapHole {
			var h *mapHole
			pl, missing, h = d.planLocked(lo, hi, full)
			return h
		})
		switch {
		case err != nil:
		case missing == lackNothing:
			return pl, nil
		case missing == lackBlocks && full:
			// What is being freed right now may be enough.
			if freeing := d.lastBatch(); freeing != nil && waits < 3 {
				waits++
				err = d.settled(ctx, freeing)
			} else {
				err = ErrNoSpace
			}
		case missing == lackBlocks:
			if err = d.growData(ctx); errors.Is(err, ErrNoSpace) {
				full, err = true, nil
			}
		default:
			err = d.provide(ctx, missing, PurposeData)
		}
		if err != nil {
			return plan{}, fmt.Errorf("thinprov: write: %w", err)
		}
	}
}

// lastBatch is the last batch that is not durable yet, nil if there is none.
func (d *Disk) lastBatch() *batch {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.sealLocked()
}

// planLocked tries to plan. If it returns a hole or a lack, it has changed nothing.
func (d *Disk) planLocked(lo, hi uint64, full bool) (plan, lack, *mapHole) {
	if d.failed != nil {
		return plan{}, lackLog, nil // provide says why
	}
	const chunk = layout.ChunkBlocks
	from, to := lo/chunk*chunk, (hi+chunk-1)/chunk*chunk
	if lo > 0 && from == lo {
		from-- // the block before
	}
	d.near = d.near[:0]
	if h := d.head.Scan(from, to, func(e layout.Extent) bool { d.near = append(d.near, e); return true }); h != nil {
		return plan{}, lackNothing, h
	}
	pl := plan{firstOld: physicalOf(d.near, lo), lastOld: physicalOf(d.near, hi-1)}
	for at, i := lo, 0; at < hi; {
		for i < len(d.near) && d.near[i].End() <= at {
			i++
		}
		end := hi
		if i < len(d.near) && d.near[i].Logical > at {
			end = min(end, d.near[i].Logical)
		} else if i < len(d.near) {
			e := d.near[i]
			birth, till := d.ownAfter(at)
			end = min(end, e.End(), till)
			physical := e.Physical + (at - e.Logical)
			if !e.Foreign && e.Birth > birth && !d.alloc.suspects(run{physical, end - at}) {
				pl.add(piece{segment: segment{at, end - at, physical}})
				at = end
				continue
			}
		}
		r := d.alloc.place(d.wishLocked(&pl, at, end-at, full))
		if r.count == 0 {
			d.unplanLocked(&pl)
			return plan{}, lackBlocks, nil
		}
		pl.add(piece{segment{at, r.count, r.first}, true})
		at += r.count
	}
	return d.admitLocked(pl)
}

// admitLocked sets aside what the plan needs besides its blocks.
func (d *Disk) admitLocked(pl plan) (plan, lack, *mapHole) {
	if pl.fresh > 0 {
		need := recordBytes(pl.fresh*mapEntryBytes + openEntryBytes)
		if missing := d.missingLocked(need, PurposeData); missing != lackNothing {
			d.unplanLocked(&pl)
			return plan{}, missing, nil
		}
		pl.promised = need
		d.ring.promised += need
	}
	pl.phase = d.rd.pins.enter()
	return pl, lackNothing, nil
}

const (
	mapEntryBytes  = 24
	openEntryBytes = 24 // a batch may have to begin with it
)

func (d *Disk) unplanLocked(pl *plan) {
	for _, x := range pl.pieces {
		if x.fresh {
			eachSlab(run{x.physical, x.count}, func(r run) { d.alloc.unreserve(r, false) })
		}
	}
}

// physicalOf is where a logical block lies by the given extents, 0 if nowhere.
func physicalOf(extents []layout.Extent, key uint64) uint64 {
	for _, e := range extents {
		if e.Logical <= key && key < e.End() {
			return e.Physical + (key - e.Logical)
		}
	}
	return 0
}

// wishLocked says where blocks would best go: beside what the head alone has, by
// d.near and the plan so far, in the same 64 KiB.
func (d *Disk) wishLocked(pl *plan, at, count uint64, full bool) wish {
	const chunk = layout.ChunkBlocks
	w := wish{logical: at, count: count, anyHole: full}
	consider := func(s segment) {
		if s.logical+s.count == at {
			w.before = s.physical + s.count - 1
		}
		lo, hi := max(s.logical, at/chunk*chunk), min(s.logical+s.count, at/chunk*chunk+chunk)
		if lo >= hi {
			return
		}
		if p := s.physical + (lo - s.logical); p%chunk == lo%chunk {
			w.chunk = p - lo%chunk
		}
	}
	for _, e := range d.near {
		if birth, _ := d.ownAfter(at); !e.Foreign && e.Birth > birth {
			consider(segment{e.Logical, uint64(e.Length), e.Physical})
		}
	}
	for i := max(len(pl.pieces)-2, 0); i < len(pl.pieces); i++ {
		consider(pl.pieces[i].segment)
	}
	return w
}

// nodesForData are free blocks that a write must leave for tree nodes, so that
// discards and deletes, which must leave nodesAlways, can still be done on a volume
// without any space.
const (
	nodesForData = 160
	nodesAlways  = 24
)

// missingLocked tells what a change of the trees that logs up to n bytes lacks.
func (d *Disk) missingLocked(n uint64, purpose Purpose) lack {
	leave := uint64(nodesAlways)
	if purpose == PurposeData {
		leave = nodesForData
	}
	// The next checkpoint writes the nodes made since the last, and those of the slab
	// table that tell about the slabs changed.
	const perLeaf = layout.NodeRoom / layout.SlabEntryBytes
	tables := min(uint64(len(d.alloc.dirty)), uint64(len(d.alloc.slabs))/(perLeaf/2)+1) + 4
	switch {
	case !d.ring.fits(n):
		return lackLog
	case d.alloc.freeTree < d.made+tables+leave:
		return lackNodes
	}
	return lackNothing
}

// provide makes room for what is missing.
func (d *Disk) provide(ctx context.Context, missing lack, purpose Purpose) error {
	if missing == lackLog {
		return d.awaitCheckpoint(ctx)
	}
	err := d.growTree(ctx, 1, purpose)
	if !errors.Is(err, ErrNoSpace) {
		return err
	}
	// Two checkpoints set free whatever nodes have been replaced.
	for range 2 {
		if err := d.awaitCheckpoint(ctx); err != nil {
			return err
		}
		d.mu.Lock()
		missing := d.missingLocked(0, purpose)
		d.mu.Unlock()
		if missing == lackNothing {
			return nil
		}
	}
	return err
}
