package thinprov

import (
	"context"
	"fmt"
	"slices"

	"basalt/thinprov/layout"
)

// Deleting a snapshot s that lies between its parent p and its child c (the next
// snapshot, or the head) frees what s maps and neither of them does: what was born
// after p and is not mapped by c at the same place. It goes through the map in steps;
// each is one log entry that names a range of keys, and is recomputed at replay over
// the same trees. Below the cursor the child's parent is p already: what the head
// drops there is freed by the head. The nodes of s go at the end, in one go.

// One step looks at about so many nodes of the snapshot, and extents of its child,
// so that what it does under Disk.mu is bounded, and does not grow with the square of
// the map when that has to be loaded.
const (
	stepNodes   = 128
	stepExtents = 64 * layout.NodeRoom / layout.ExtentBytes
)

// DeleteSnapshot deletes a snapshot and frees what only it holds. I/O goes on
// meanwhile. If it is interrupted, by ctx or a crash, the snapshot is gone all the
// same, and the next DeleteSnapshot goes on freeing its blocks.
//
// ErrPublished while others use it, ErrBusy while it has an open view here.
func (d *Disk) DeleteSnapshot(ctx context.Context, uuid [16]byte) error {
	if err := d.begin(true); err != nil {
		return err
	}
	defer d.end()
	select {
	case d.deletion <- struct{}{}:
		defer func() { <-d.deletion }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := d.finishDeletion(ctx); err != nil {
		return fmt.Errorf("thinprov: finish the deletion before: %w", err)
	}
	err := d.logAndWait(ctx, rankFree, func() (layout.Entry, bool, error) {
		s, err := d.visibleLocked(uuid)
		switch {
		case err != nil:
			return layout.Entry{}, false, err
		case s.Published != (Ref{}):
			return layout.Entry{}, false, ErrPublished
		case s.views > 0:
			return layout.Entry{}, false, ErrBusy
		}
		return layout.Entry{Kind: layout.EntryDeleteBegin, Epoch: s.Epoch}, true, nil
	})
	if err != nil {
		return err
	}
	if err := d.finishDeletion(ctx); err != nil {
		return fmt.Errorf("thinprov: delete snapshot: %w", err)
	}
	return nil
}

// ResumeDeletion goes on with the deletion of a snapshot that was interrupted, if
// there is one.
func (d *Disk) ResumeDeletion(ctx context.Context) error {
	if err := d.begin(true); err != nil {
		return err
	}
	defer d.end()
	select {
	case d.deletion <- struct{}{}:
		defer func() { <-d.deletion }()
	case <-ctx.Done():
		return ctx.Err()
	}
	return d.finishDeletion(ctx)
}

// finishDeletion takes the deletion in progress to its end. Needs deletion.
func (d *Disk) finishDeletion(ctx context.Context) error {
	if err := d.begun(ctx); err != nil {
		return err
	}
	var last *batch
	for {
		d.mu.Lock()
		s := d.deleting
		d.mu.Unlock()
		if s == nil {
			break
		}
		at := uint64(0)
		b, err := d.change(ctx, rankFree, func() (layout.Entry, bool, error) {
			if s.Cursor < layout.MaxKeys {
				st, _ := d.stepOf(s, s.Cursor, 0)
				return layout.Entry{Kind: layout.EntryDeleteStep, Epoch: s.Epoch, From: s.Cursor, To: st.to}, true, nil
			}
			return layout.Entry{Kind: layout.EntryDeleteEnd, Epoch: s.Epoch}, true, nil
		}, func() *mapHole {
			if s.Cursor < layout.MaxKeys {
				_, h := d.stepOf(s, s.Cursor, 0)
				return h
			}
			return d.unloadedOf(s, &at)
		})
		if err != nil {
			return err
		}
		last = b
		wake(d.commitKick)
	}
	if last == nil {
		return nil
	}
	return d.settled(ctx, last)
}

// begun waits until the beginning of the deletion in progress is durable. Before, no
// step may be applied: the head writes in place below the cursor, and a crash would
// bring the snapshot back with what was written there.
func (d *Disk) begun(ctx context.Context) error {
	d.mu.Lock()
	var b *batch
	if d.deleting != nil {
		b = d.sealLocked()
	}
	d.mu.Unlock()
	if b == nil {
		return nil
	}
	return d.settled(ctx, b)
}

// childOf is the map of the next snapshot after s, or the head's.
func (d *Disk) childOf(s *snapshot) mapTree {
	if i := slices.Index(d.snaps, s); i+1 < len(d.snaps) {
		return d.snaps[i+1].root
	}
	return d.head
}

// step is a part of a deletion.
type step struct {
	to      uint64 // keys below it are done
	frees   []run  // blocks that nothing refers to any more
	bounded bool   // to follows from how much there is to do; else it is given
	full    bool   // to was found
	seen    int    // nodes of the snapshot
	shown   int    // extents of its child
	tables  tally
}

// stop ends a step that is full.
func (st *step) stop(to uint64) {
	if !st.full {
		st.full, st.to = true, to
	}
}

// stepOf computes the step from a key up to to, or if that is 0 to where enough has
// been looked at. It changes nothing.
func (d *Disk) stepOf(s *snapshot, from, to uint64) (step, *mapHole) {
	child := d.childOf(s)
	st := step{to: to, bounded: to == 0, tables: d.newTally()}
	if st.bounded {
		st.to = layout.MaxKeys
	}
	var hole *mapHole
	h := s.root.Nodes(func(n *mapNode, lo, hi uint64) bool {
		if hole != nil || hi <= from || lo >= st.to || n.Birth() <= s.Parent || n.Foreign() {
			return false
		}
		if st.seen++; st.bounded && st.seen > stepNodes && lo > from {
			st.stop(lo)
			return false
		}
		shared, h := child.Holds(n, lo, hi)
		if hole = h; h != nil || shared {
			return false
		}
		if n.Level() > 0 {
			return true
		}
		hole = st.leaf(n, child, s.Parent, max(lo, from), min(hi, st.to))
		return false
	})
	if hole == nil {
		hole = h
	}
	return st, hole
}

// leaf adds what the part [lo,hi) of a leaf of the snapshot leaves behind.
func (st *step) leaf(n *mapNode, child mapTree, parent, lo, hi uint64) *mapHole {
	for _, e := range n.Entries() {
		from, to := max(e.Logical, lo), min(e.End(), hi)
		if st.full || from >= to || e.Foreign || e.Birth <= parent {
			continue
		}
		at := from
		h := child.Scan(from, to, func(c layout.Extent) bool {
			if st.shown++; st.bounded && st.shown > stepExtents {
				st.drop(e, at, max(c.Logical, from))
				st.stop(max(c.Logical, from))
				return false
			}
			if c.Foreign || c.Physical-c.Logical != e.Physical-e.Logical {
				return true // other blocks: those of s are dropped
			}
			st.drop(e, at, max(c.Logical, from))
			at = min(c.End(), to)
			return !st.full
		})
		if h != nil {
			return h
		}
		st.drop(e, at, to)
	}
	return nil
}

// drop frees the blocks of e for the keys [at,until), or fewer if the step is full.
func (st *step) drop(e layout.Extent, at, until uint64) {
	for at < until && !st.full {
		r := run{first: e.Physical + (at - e.Logical)}
		r.count = min(until-at, layout.BlocksPerSlab-r.first%layout.BlocksPerSlab)
		st.frees = append(st.frees, r)
		st.tables.add(r.first, r.count)
		at += r.count
		if st.bounded && st.tables.full() {
			st.stop(at)
		}
	}
}

// unloadedOf is the next node, from the key *at on, that nodesOf lacks. It moves *at
// on, so that loading all of them does not begin from the start with each.
func (d *Disk) unloadedOf(s *snapshot, at *uint64) *mapHole {
	for {
		from := *at
		if _, h := d.nodesOf(s, from); h != nil {
			*at = h.Low()
			return h
		}
		if *at = 0; from == 0 {
			return nil
		}
	}
}

// nodesOf lists the blocks of the nodes that only s has, and whose range ends behind
// the key.
func (d *Disk) nodesOf(s *snapshot, from uint64) ([]uint64, *mapHole) {
	child := d.childOf(s)
	var blocks []uint64
	var hole *mapHole
	h := s.root.Nodes(func(n *mapNode, lo, hi uint64) bool {
		if hole != nil || hi <= from || n.Birth() <= s.Parent || n.Foreign() {
			return false
		}
		shared, h := child.Holds(n, lo, hi)
		if hole = h; h != nil || shared {
			return false
		}
		if n.Block() != 0 {
			blocks = append(blocks, n.Block())
		}
		return n.Level() > 0
	})
	if hole == nil {
		hole = h
	}
	return blocks, hole
}

// applyToSnapshot applies an entry that is about one snapshot.
func (d *Disk) applyToSnapshot(e layout.Entry) ([]run, error) {
	s := d.snapByEpoch(e.Epoch)
	if s == nil {
		return nil, logCorrupt("no snapshot of epoch %d", e.Epoch)
	}
	d.staleSnaps[s.Epoch] = true
	switch e.Kind {
	case layout.EntryPublish:
		s.Published = e.Ref
		s.Flags |= layout.SnapshotPublished
		return nil, nil
	case layout.EntryUnpublish:
		s.Published = Ref{}
		s.Flags &^= layout.SnapshotPublished
		return nil, nil
	case layout.EntryDeleteBegin:
		if d.deleting != nil || s.Flags&layout.SnapshotPublished != 0 {
			return nil, logCorrupt("deletion of epoch %d begins although it must not", e.Epoch)
		}
		s.Flags |= layout.SnapshotDeleting
		d.deleting = s
		return nil, nil
	}
	if d.deleting != s {
		return nil, logCorrupt("deletion of epoch %d goes on but never began", e.Epoch)
	}
	if e.Kind == layout.EntryDeleteStep {
		return d.applyStep(s, e)
	}
	return nil, d.applyDeleteEnd(s)
}

func (d *Disk) applyStep(s *snapshot, e layout.Entry) ([]run, error) {
	if e.From != s.Cursor || e.To <= e.From {
		return nil, logCorrupt("deletion from %d to %d, the cursor is at %d", e.From, e.To, s.Cursor)
	}
	st, h := d.stepOf(s, e.From, e.To)
	if h != nil {
		return nil, logCorrupt("deletion of epoch %d met a node that is not loaded", s.Epoch)
	}
	for _, r := range st.frees {
		if err := d.alloc.unuse(r); err != nil {
			return nil, err
		}
	}
	s.Cursor = e.To
	return st.frees, nil
}

// applyDeleteEnd takes s out of the line.
func (d *Disk) applyDeleteEnd(s *snapshot) error {
	blocks, h := d.nodesOf(s, 0)
	if h != nil || s.Cursor < layout.MaxKeys {
		return logCorrupt("deletion of epoch %d ends early", s.Epoch)
	}
	for _, blk := range blocks {
		d.nodeFreed(blk)
	}
	i := slices.Index(d.snaps, s)
	if i+1 < len(d.snaps) {
		next := d.snaps[i+1]
		next.Parent = s.Parent
		d.staleSnaps[next.Epoch] = true
	} else {
		d.parent = s.Parent
	}
	d.snaps = slices.Delete(d.snaps, i, i+1)
	d.deleting = nil
	return nil
}
