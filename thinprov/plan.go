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
	nodes             uint64 // tree blocks set aside for mapping them
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
			err = d.provide(ctx, missing, rankWrite)
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
		pl.nodes = nodesPerPart + d.slabLeaves(pl.fresh)
		d.promisedNodes += pl.nodes
		if missing := d.missingLocked(need, rankWrite); missing != lackNothing {
			d.promisedNodes -= pl.nodes
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
			eachSlab(run{x.physical, x.count}, d.alloc.unreserve)
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
