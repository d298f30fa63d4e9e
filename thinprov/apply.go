package thinprov

import (
	"fmt"
	"slices"

	"basalt/block"
	"basalt/thinprov/cowtree"
	"basalt/thinprov/layout"
)

// editor is for edits of the head's map.
func (d *Disk) editor() *cowtree.Editor {
	return &cowtree.Editor{Epoch: d.epoch, OwnAfter: d.parent, Gen: d.gen, Freed: d.nodeFreed, Made: func() { d.made++ }}
}

// tableEditor is for edits of the slab and snapshot tables, which have one version.
func (d *Disk) tableEditor() *cowtree.Editor {
	ed := d.editor()
	ed.OwnAfter = 0
	return ed
}

// nodeFreed takes a node's block out of use. Two checkpoints may still need it.
func (d *Disk) nodeFreed(blk uint64) {
	r := run{blk, 1}
	if err := d.alloc.unuse(r); err != nil {
		_ = d.failLocked(err) // two nodes at one address: the disk is damaged
		return
	}
	d.nodeFrees = append(d.nodeFrees, r)
}

// ownAfter is the epoch after which a block mapped by the head at key must be born to
// be the head's alone. While the head's parent is being deleted, the keys before the
// cursor belong to the parent's parent already (R16). It holds up to the given end.
func (d *Disk) ownAfter(key uint64) (birth, end uint64) {
	if s := d.deleting; s != nil && s.Epoch == d.parent {
		if key < s.Cursor {
			return s.Parent, s.Cursor
		}
	}
	return d.parent, layout.MaxKeys
}

// eachOwn calls visit for the parts of e within [lo,hi), with whether they are the
// head's alone.
func (d *Disk) eachOwn(e layout.Extent, lo, hi uint64, visit func(part segment, own bool)) {
	for at, to := max(e.Logical, lo), min(e.End(), hi); at < to; {
		birth, end := d.ownAfter(at)
		end = min(end, to)
		visit(segment{at, end - at, e.Physical + (at - e.Logical)}, !e.Foreign && e.Birth > birth)
		at = end
	}
}

// eachSlab splits a physical run at the ends of slabs.
func eachSlab(r run, visit func(run)) {
	for r.count > 0 {
		n := min(r.count, layout.BlocksPerSlab-r.first%layout.BlocksPerSlab)
		visit(run{r.first, n})
		r = run{r.first + n, r.count - n}
	}
}

// remap replaces what the head maps in [lo,hi) by blocks from physical on, or by a
// hole if that is 0, and returns the blocks that nothing refers to any more. The
// nodes of the range are loaded. Requests and replay come through here alike.
func (d *Disk) remap(lo, hi, physical uint64) ([]run, error) {
	var frees []run
	var broken error
	free := func(e layout.Extent, from, to uint64) {
		d.eachOwn(e, from, to, func(part segment, own bool) {
			d.mapped -= part.count
			if !e.Foreign {
				d.own -= part.count
			}
			if !own {
				return
			}
			eachSlab(run{part.physical, part.count}, func(r run) {
				frees = append(frees, r)
				broken = firstOf(broken, d.alloc.unuse(r))
			})
		})
	}
	if physical != 0 {
		eachSlab(run{physical, hi - lo}, func(r run) { broken = firstOf(broken, d.alloc.use(r)) })
		if broken != nil {
			return nil, broken
		}
	} else if d.head.Root() == nil {
		return nil, nil
	}
	d.head.Edit(&mapKind, d.editor(), lo, hi, func(leaf []layout.Extent, from, to uint64) []layout.Extent {
		var with *layout.Extent
		if physical != 0 {
			with = &layout.Extent{Logical: from, Length: uint32(to - from), Physical: physical + (from - lo), Birth: d.epoch}
		}
		return splice(leaf, from, to, with, free)
	})
	if physical != 0 {
		d.mapped += hi - lo
		d.own += hi - lo
	}
	return frees, broken
}

// splice replaces the extents of a leaf in [lo,hi) by one or none, joined with its
// neighbours where they continue each other, and reports each removed part.
func splice(leaf []layout.Extent, lo, hi uint64, with *layout.Extent, removed func(e layout.Extent, lo, hi uint64)) []layout.Extent {
	i, _ := slices.BinarySearchFunc(leaf, lo, func(e layout.Extent, k uint64) int {
		if e.End() <= k {
			return -1
		}
		return 1
	})
	j := i
	var repl []layout.Extent
	for ; j < len(leaf) && leaf[j].Logical < hi; j++ {
		e := leaf[j]
		removed(e, max(e.Logical, lo), min(e.End(), hi))
		if e.Logical < lo {
			head := e
			head.Length = uint32(lo - e.Logical)
			repl = append(repl, head)
		}
		if j == i && with != nil {
			repl = append(repl, *with)
			with = nil
		}
		if e.End() > hi {
			tail := e
			tail.Logical, tail.Physical = hi, e.Physical+(hi-e.Logical)
			tail.Length = uint32(e.End() - hi)
			repl = append(repl, tail)
		}
	}
	if with != nil {
		repl = append(repl, *with)
	}
	if i > 0 {
		i--
		repl = append([]layout.Extent{leaf[i]}, repl...)
	}
	if j < len(leaf) {
		repl = append(repl, leaf[j])
		j++
	}
	return slices.Replace(leaf, i, j, joined(repl)...)
}

// joined merges extents that continue each other on both sides and are of one birth.
func joined(in []layout.Extent) []layout.Extent {
	out := in[:0]
	for _, e := range in {
		if n := len(out); n > 0 {
			p := &out[n-1]
			if p.End() == e.Logical && p.Physical+uint64(p.Length) == e.Physical && p.Birth == e.Birth &&
				p.Foreign == e.Foreign && uint64(p.Length)+uint64(e.Length) <= layout.MaxExtent {
				p.Length += e.Length
				continue
			}
		}
		out = append(out, e)
	}
	return out
}

// apply changes the trees and tables as a log entry says, and returns the data
// blocks that it frees. The nodes that it needs are loaded.
func (d *Disk) apply(e layout.Entry) ([]run, error) {
	switch e.Kind {
	case layout.EntryMap:
		if e.Logical+e.Length > blocksUp(d.size) {
			return nil, logCorrupt("%d blocks mapped at %d, behind the end of the disk", e.Length, e.Logical)
		}
		return d.remap(e.Logical, e.Logical+e.Length, e.Physical)
	case layout.EntryUnmap:
		return d.remap(e.Logical, e.Logical+e.Length, 0)
	case layout.EntrySnapshot:
		return nil, d.applySnapshot(e)
	case layout.EntryDeleteBegin, layout.EntryDeleteStep, layout.EntryDeleteEnd, layout.EntryPublish, layout.EntryUnpublish:
		return d.applyToSnapshot(e)
	case layout.EntryClaim:
		d.claim = &claim{kind: e.Slab, units: e.Units}
	case layout.EntryClaimed:
		d.claim = nil
		for _, num := range e.Slabs {
			if err := d.addSlab(num, e.Slab); err != nil {
				return nil, err
			}
		}
	case layout.EntryRelease:
		for _, num := range e.Slabs {
			s := d.alloc.slabs[num]
			if s == nil || s.taken() != (bitmap{}) {
				return nil, logCorrupt("slab %d is released but not empty", num)
			}
			d.alloc.remove(s)
		}
		d.releasing = e.Slabs
	case layout.EntryReleased:
		d.releasing = nil
	case layout.EntryResize:
		d.size = e.SizeBytes
	case layout.EntryOpen:
		d.clean = false
	default:
		return nil, logCorrupt("entry of kind %d", e.Kind)
	}
	return nil, nil
}

func (d *Disk) addSlab(num uint64, kind layout.SlabKind) error {
	s := &slab{num: num, kind: kind}
	if err := d.alloc.add(s); err != nil {
		return err
	}
	d.alloc.markDirty(s)
	return nil
}

func logCorrupt(format string, args ...any) error {
	return &block.CorruptError{Object: "log", Reason: fmt.Sprintf(format, args...)}
}

// need is the hole that must be filled before apply(e), if any. *at is where it goes
// on looking; 0 at first.
func (d *Disk) need(e layout.Entry, at *uint64) *mapHole {
	switch e.Kind {
	case layout.EntryMap, layout.EntryUnmap:
		return d.head.Need(e.Logical, e.Logical+e.Length)
	case layout.EntryDeleteStep:
		if s := d.snapByEpoch(e.Epoch); s != nil {
			_, h := d.stepOf(s, e.From, e.To)
			return h
		}
	case layout.EntryDeleteEnd:
		if s := d.snapByEpoch(e.Epoch); s != nil {
			return d.unloadedOf(s, at)
		}
	}
	return nil
}
