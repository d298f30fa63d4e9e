package thinprov

import (
	"context"
	"maps"
	"slices"

	"basalt/block"
	"basalt/thinprov/layout"
)

// A request is handled in parts of at most partBlocks, cut at multiples of it, so
// that its log entries and the work under Disk.mu are bounded.
const partBlocks = 256

// WriteAt writes p at offBytes. What had to be allocated is durable when it returns
// nil; the rest is in the device's cache. After an error, ctx's included, each block
// of the range is old or new, and may still change from old to new until it is written
// again or a snapshot is made. ctx does not end a write that the device has begun.
func (d *Disk) WriteAt(ctx context.Context, p []byte, offBytes int64) error {
	return d.write(ctx, p, offBytes, d.putCached)
}

// WriteFUA writes p at offBytes; p is durable when it returns nil.
func (d *Disk) WriteFUA(ctx context.Context, p []byte, offBytes int64) error {
	return d.write(ctx, p, offBytes, d.store.WriteFUA)
}

// putFunc is putCached or Store.WriteFUA.
type putFunc func(ctx context.Context, p []byte, offBytes int64) error

func (d *Disk) putCached(ctx context.Context, p []byte, offBytes int64) error {
	d.caching.Add(1)
	err := d.store.WriteAt(ctx, p, offBytes)
	d.unflushed.Store(true) // before caching goes down; see flushDevice
	d.caching.Add(-1)
	return err
}

func (d *Disk) write(ctx context.Context, p []byte, offBytes int64, put putFunc) error {
	if err := d.begin(true); err != nil {
		return err
	}
	defer d.end()
	if err := checkRange(d.SizeBytes(), offBytes, int64(len(p))); err != nil || len(p) == 0 {
		return err
	}
	held, err := d.lockRange(ctx, uint64(offBytes)/BlockBytes, blocksUp(offBytes+int64(len(p))))
	if err != nil {
		return err
	}
	last, err := d.writeParts(ctx, p, offBytes, put)
	return d.finish(ctx, held, last, err)
}

// finish lets the range go once everything that was appended under it is durable,
// and waits for that. last is the batch of the last entry, nil if there was none.
func (d *Disk) finish(ctx context.Context, held *heldRange, last *batch, err error) error {
	d.mu.Lock()
	handed := false
	if last != nil {
		select {
		case <-last.done:
		default:
			last.ranges = append(last.ranges, held)
			handed = true
		}
	}
	if !handed {
		d.ranges.release(held)
	}
	d.mu.Unlock()
	if last == nil {
		return err
	}
	return firstOf(err, d.settled(ctx, last))
}

// writeParts writes p part by part. The batch it returns is that of the last part
// that had to allocate; batches become durable in order.
func (d *Disk) writeParts(ctx context.Context, p []byte, offBytes int64, put putFunc) (*batch, error) {
	var last *batch
	for len(p) > 0 {
		const partBytes = partBlocks * BlockBytes
		n := min(int64(len(p)), partBytes-offBytes%partBytes)
		b, err := d.writePart(ctx, p[:n], offBytes, put)
		if b != nil {
			last = b
		}
		if err != nil {
			return last, err
		}
		p, offBytes = p[n:], offBytes+n
	}
	return last, nil
}

func blocksUp(offBytes int64) uint64 { return uint64(offBytes+BlockBytes-1) / BlockBytes }

// writePart writes a part whose range is locked.
func (d *Disk) writePart(ctx context.Context, p []byte, offBytes int64, put putFunc) (*batch, error) {
	lo, hi := uint64(offBytes)/BlockBytes, blocksUp(offBytes+int64(len(p)))
	pl, err := d.planWrite(ctx, lo, hi)
	if err != nil {
		return nil, err
	}
	for _, x := range pl.pieces {
		begun := false
		try := func(ctx context.Context, p []byte, offBytes int64) error {
			begun = true
			// A write that is given up may land later, over what was written since.
			return put(context.WithoutCancel(ctx), p, offBytes)
		}
		if x.fresh {
			err = d.writeFresh(ctx, pl, x.segment, p, offBytes, try)
		} else {
			err = d.overwrite(ctx, x.segment, p, offBytes, try)
		}
		if err != nil {
			d.mu.Lock()
			if begun {
				d.doubtLocked(x)
			}
			d.abandonLocked(pl, 0)
			d.mu.Unlock()
			return nil, err
		}
	}
	if pl.fresh == 0 {
		d.mu.Lock()
		d.rd.leave(pl.phase)
		d.mu.Unlock()
		return nil, nil
	}
	return d.mapPieces(ctx, pl)
}

// overwrite writes the part of p, which begins at offBytes of the disk, that s
// covers, in place. On a device of 4096-byte blocks smaller edges are read first.
func (d *Disk) overwrite(ctx context.Context, s segment, p []byte, offBytes int64, put putFunc) error {
	part, at := s.of(p, offBytes)
	l := int64(d.store.Geometry().LogicalBytes)
	from, to := at/l*l, (at+int64(len(part))+l-1)/l*l
	if from == at && to == at+int64(len(part)) {
		return put(ctx, part, at)
	}
	b := block.AlignedBuffer(int(to - from))
	if err := d.store.ReadAt(ctx, b, from); err != nil {
		return err
	}
	copy(b[at-from:], part)
	return put(ctx, b, from)
}

// of is the part of p, which begins at offBytes of the disk, that s covers, and its
// place on the device.
func (s segment) of(p []byte, offBytes int64) ([]byte, int64) {
	start := int64(s.logical) * BlockBytes
	from := max(start, offBytes)
	to := min(start+int64(s.count)*BlockBytes, offBytes+int64(len(p)))
	return p[from-offBytes : to-offBytes], int64(s.physical)*BlockBytes + from - start
}

// writeFresh is overwrite for new blocks, which are always written whole: what p
// does not cover of the first and last block is their old content, or zeros. So
// nothing that a block held for another owner is ever seen.
func (d *Disk) writeFresh(ctx context.Context, pl plan, s segment, p []byte, offBytes int64, put putFunc) error {
	part, at := s.of(p, offBytes)
	start, size := int64(s.physical)*BlockBytes, int64(s.count)*BlockBytes
	if int64(len(part)) == size {
		return put(ctx, part, at)
	}
	b := block.AlignedBuffer(int(size))
	fill := func(old uint64, b []byte) error {
		if old == 0 {
			return nil
		}
		return d.store.ReadAt(ctx, b, int64(old)*BlockBytes)
	}
	if at > start {
		if err := fill(pl.firstOld, b[:BlockBytes]); err != nil {
			return err
		}
	}
	headOnly := s.count == 1 && at > start // one block with both edges is read once
	if at+int64(len(part)) < start+size && !headOnly {
		if err := fill(pl.lastOld, b[size-BlockBytes:]); err != nil {
			return err
		}
	}
	copy(b[at-start:], part)
	return put(ctx, b, start)
}

// mapPieces maps the fresh pieces of a plan whose data was written.
func (d *Disk) mapPieces(ctx context.Context, pl plan) (*batch, error) {
	var last *batch
	var cause error
	// The data is written: giving up now would only leave more to tidy.
	err := d.rd.with(context.WithoutCancel(ctx), func() *mapHole {
		for _, x := range pl.pieces {
			if h := d.head.Need(x.logical, x.logical+x.count); h != nil {
				return h
			}
		}
		promised := pl.promised
		for i, x := range pl.pieces {
			if !x.fresh {
				continue
			}
			e := layout.Entry{Kind: layout.EntryMap, Logical: x.logical, Length: x.count, Physical: x.physical}
			if last, cause = d.logLocked(e, promised); cause != nil {
				d.abandonLocked(pl, i)
				return nil
			}
			promised, pl.promised = 0, 0
		}
		d.rd.leave(pl.phase)
		d.promisedNodes -= pl.nodes
		return nil
	})
	if err != nil {
		d.mu.Lock()
		d.abandonLocked(pl, 0)
		d.mu.Unlock()
	}
	return last, firstOf(cause, err)
}

// logLocked applies an entry and appends it to the log; promised bytes of the ring
// pass to the batch. An entry that cannot be applied means that the disk is damaged:
// it fails for good.
func (d *Disk) logLocked(e layout.Entry, promised uint64) (*batch, error) {
	if d.failed != nil {
		return nil, d.failed
	}
	frees, err := d.apply(e)
	if err != nil {
		return nil, d.failLocked(err)
	}
	b := d.appendLocked(e, promised)
	b.frees = append(b.frees, frees...)
	return b, d.failed
}

// abandonLocked gives up the pieces of a plan from the given one on. Blocks to which
// no write failed can be given out again: what was written to them has landed.
func (d *Disk) abandonLocked(pl plan, from int) {
	d.rd.leave(pl.phase)
	d.ring.promised -= pl.promised
	d.promisedNodes -= pl.nodes
	for _, x := range pl.pieces[from:] {
		if x.fresh {
			eachSlab(run{x.physical, x.count}, d.alloc.unreserve)
		}
	}
}

// doubtLocked notes that a write to a piece failed, which may still land. Its blocks
// are not given out again in this session; in place they are not changed again, and
// leave the map before the next snapshot.
func (d *Disk) doubtLocked(x piece) {
	eachSlab(run{x.physical, x.count}, d.alloc.suspect)
	if !x.fresh {
		d.doubtful[x.logical/partBlocks] = true
	}
}

// moveDoubtful copies what a failed write may still change to blocks of its own, so
// that a snapshot can promise that it stays. The caller holds the whole disk's range.
// The batch is the last that maps a copy.
func (d *Disk) moveDoubtful(ctx context.Context) (*batch, error) {
	d.mu.Lock()
	parts := slices.Sorted(maps.Keys(d.doubtful))
	d.mu.Unlock()
	var last *batch
	for _, part := range parts {
		segs, err := d.suspected(ctx, part*partBlocks, (part+1)*partBlocks)
		if err != nil {
			return last, err
		}
		for _, s := range segs {
			p := block.AlignedBuffer(int(s.count) * BlockBytes)
			if err := d.store.ReadAt(ctx, p, int64(s.physical)*BlockBytes); err != nil {
				return last, err
			}
			b, err := d.writePart(ctx, p, int64(s.logical)*BlockBytes, d.putCached)
			if b != nil {
				last = b
			}
			if err != nil {
				return last, err
			}
		}
		d.mu.Lock()
		delete(d.doubtful, part)
		d.mu.Unlock()
	}
	return last, nil
}

// suspected lists what the head maps in [lo,hi) to blocks that a failed write may
// still change.
func (d *Disk) suspected(ctx context.Context, lo, hi uint64) ([]segment, error) {
	var segs []segment
	err := d.rd.with(ctx, func() *mapHole {
		segs = segs[:0]
		return d.head.Scan(lo, hi, func(e layout.Extent) bool {
			from, to := max(e.Logical, lo), min(e.End(), hi)
			s := segment{from, to - from, e.Physical + (from - e.Logical)}
			if d.alloc.suspects(run{s.physical, s.count}) {
				segs = append(segs, s)
			}
			return true
		})
	})
	return segs, err
}
