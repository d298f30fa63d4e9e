package thinprov

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"

	"basalt/block"
	"basalt/internal/clock"
	"basalt/thinprov/cowtree"
	"basalt/thinprov/layout"
)

// Severity tells what a finding means.
type Severity uint8

// Severities of a finding.
const (
	Leak   Severity = 1 // space that nothing uses and nobody can get; data is safe
	Damage Severity = 2 // data is lost, or may be lost by further writes
)

func (s Severity) String() string {
	switch s {
	case Leak:
		return "leak"
	case Damage:
		return "damage"
	}
	return fmt.Sprintf("severity %d", uint8(s))
}

// Finding is something that Check found wrong.
type Finding struct {
	Severity Severity
	OffBytes int64 // where on the device; 0 if it has no one place
	Text     string
}

// Report is what Check found.
type Report struct {
	Findings  []Finding // at most maxFindings; Omitted counts the others
	Omitted   int
	Slabs     []int64  // that the disk believes to own, ascending
	Claiming  []uint32 // owner-table units of an open claim: more slabs there may be its own
	Releasing []int64  // slabs of an open release: they may still be its own
	Replayed  int      // log records behind the checkpoint
	Nodes     int      // tree nodes on media
	Snapshots int
}

// Damaged reports whether a finding is damage.
func (r Report) Damaged() bool {
	return slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.Severity == Damage })
}

const maxFindings = 1000

// Check verifies the disk of the store as the next Open would see it, without
// writing: every node, that each block has one place in the disk, and that the slab
// table says exactly what is reachable. The error tells that the device could not be
// read; damage is in the report.
func Check(ctx context.Context, store Store) (Report, error) {
	d := newDisk(ctx, store, clock.System{}, slog.New(slog.DiscardHandler), Options{})
	d.readOnly = true
	c := checker{d: d, seen: make(map[uint64]int), owners: make(map[uint64]*slabOwners)}
	replayed, err := d.recover(ctx)
	if err != nil {
		if !c.damage(err) {
			return Report{}, err
		}
		return c.report, nil
	}
	c.report.Replayed, c.report.Snapshots = replayed, len(d.snaps)
	if d.claim != nil {
		c.report.Claiming = d.claim.units
	}
	for _, num := range d.releasing {
		c.report.Releasing = append(c.report.Releasing, int64(num)*SlabBytes)
	}
	for _, num := range sortedSlabs(d.alloc) {
		c.report.Slabs = append(c.report.Slabs, int64(num)*SlabBytes)
	}
	if err := c.checkMap(ctx, d.head, 0, 0, d.epoch); err != nil {
		return Report{}, err
	}
	for i, s := range d.snaps {
		if s != d.deleting {
			if err := c.checkMap(ctx, s.root, i+1, 0, s.Epoch); err != nil {
				return Report{}, err
			}
		}
	}
	if s := d.deleting; s != nil { // last: nodes that others share count there in full
		if err := c.checkMap(ctx, s.root, -1, s.Cursor, s.Epoch); err != nil {
			return Report{}, err
		}
	}
	checkTable(&c, d.slabTree)
	checkTable(&c, d.snapTree)
	c.compareUsed()
	return c.report, nil
}

func sortedSlabs(a *allocator) []uint64 { return slices.Sorted(maps.Keys(a.slabs)) }

type checker struct {
	d      *Disk
	report Report
	seen   map[uint64]int // blocks of map nodes, and the index of the map in which they were met
	owners map[uint64]*slabOwners
}

// slabOwners tells who refers to the blocks of a slab.
type slabOwners struct {
	reached bitmap
	logical [layout.BlocksPerSlab]uint64 // of data blocks
	birth   [layout.BlocksPerSlab]uint64
}

func (c *checker) find(s Severity, off int64, format string, args ...any) {
	if len(c.report.Findings) >= maxFindings {
		c.report.Omitted++
		return
	}
	c.report.Findings = append(c.report.Findings, Finding{s, off, fmt.Sprintf(format, args...)})
}

// ownersOf is who refers to the slab of a block, nil if it is not of the kind.
func (c *checker) ownersOf(blk uint64, kind layout.SlabKind) *slabOwners {
	num := blk / layout.BlocksPerSlab
	if s := c.d.alloc.slabs[num]; s == nil || s.kind != kind {
		return nil
	}
	if c.owners[num] == nil {
		c.owners[num] = &slabOwners{}
	}
	return c.owners[num]
}

// node notes that a tree refers to a node's block.
func (c *checker) node(blk uint64) {
	o := c.ownersOf(blk, layout.SlabTree)
	i := blk % layout.BlocksPerSlab
	switch {
	case o == nil:
		c.find(Damage, int64(blk)*BlockBytes, "tree node outside of the disk's tree slabs")
		return
	case o.reached.has(i):
		c.find(Damage, int64(blk)*BlockBytes, "tree node has two places in the trees")
	}
	o.reached.set(i, i+1)
	c.report.Nodes++
}

// extent notes that a map refers to data blocks.
func (c *checker) extent(e layout.Extent, lo, hi uint64) {
	for key := max(e.Logical, lo); key < min(e.End(), hi); key++ {
		blk := e.Physical + (key - e.Logical)
		o := c.ownersOf(blk, layout.SlabData)
		if o == nil {
			c.find(Damage, int64(blk)*BlockBytes, "block %d of the disk lies outside of its data slabs", key)
			return
		}
		i := blk % layout.BlocksPerSlab
		if o.reached.has(i) && (o.logical[i] != key || o.birth[i] != e.Birth) {
			c.find(Damage, int64(blk)*BlockBytes, "block is mapped at %d (born %d) and at %d (born %d)", o.logical[i], o.birth[i], key, e.Birth)
		}
		o.reached.set(i, i+1)
		o.logical[i], o.birth[i] = key, e.Birth
	}
}

// checkMap walks a map, the index-th, in which keys before from do not count, and
// nothing is younger than the given epoch. Subtrees that were walked as part of
// another map are skipped.
func (c *checker) checkMap(ctx context.Context, t mapTree, index int, from, epoch uint64) error {
	enter := func(n *mapNode) bool {
		if n.Block() == 0 {
			return true // made by the replay
		}
		if was, found := c.seen[n.Block()]; found {
			if was == index && !n.Foreign() {
				c.find(Damage, int64(n.Block())*BlockBytes, "tree node has two places in one map")
			}
			return false
		}
		c.seen[n.Block()] = index
		if !n.Foreign() {
			c.node(n.Block())
		}
		return true
	}
	load := func(h *mapHole) error {
		c.d.mu.Lock()
		defer c.d.mu.Unlock()
		if err := c.d.rd.load(ctx, h); err != nil && !c.damage(err) {
			return err
		}
		return nil
	}
	return t.Walk(enter, load, func(n *mapNode) {
		if n.Birth() > epoch && !n.Foreign() {
			c.find(Damage, int64(n.Block())*BlockBytes, "tree node born in epoch %d belongs to epoch %d", n.Birth(), epoch)
		}
		for _, e := range n.Entries() {
			if !e.Foreign {
				c.extent(e, from, layout.MaxKeys)
			}
			if e.Birth > n.Birth() {
				c.find(Damage, int64(n.Block())*BlockBytes, "extent at %d is born in epoch %d, its node in %d", e.Logical, e.Birth, n.Birth())
			}
		}
	})
}

// checkTable notes the nodes of a table, which are all in memory.
func checkTable[E cowtree.Entry](c *checker, t cowtree.Tree[E]) {
	t.Nodes(func(n *cowtree.Node[E], _, _ uint64) bool {
		if n.Block() != 0 {
			c.node(n.Block())
		}
		return true
	})
}

// damage adds err to the findings if it is about damage.
func (c *checker) damage(err error) bool {
	corrupt, ok := errors.AsType[*block.CorruptError](err)
	if ok {
		c.find(Damage, corrupt.OffBytes, "%v", err)
	}
	return ok
}

// compareUsed compares the slab table with what was reached.
func (c *checker) compareUsed() {
	var mapped, own uint64
	for _, num := range sortedSlabs(c.d.alloc) {
		s := c.d.alloc.slabs[num]
		if s.kind == layout.SlabLog {
			continue
		}
		var reached bitmap
		if o := c.owners[num]; o != nil {
			reached = o.reached
		}
		for i := range uint64(layout.BlocksPerSlab) {
			off := (int64(num)*layout.BlocksPerSlab + int64(i)) * BlockBytes
			switch used := s.used.has(i); {
			case used && !reached.has(i):
				c.find(Leak, off, "block counts as used but nothing refers to it")
			case !used && reached.has(i):
				c.find(Damage, off, "block is referred to but counts as free")
			}
		}
	}
	if !c.report.Damaged() {
		c.d.head.Scan(0, layout.MaxKeys, func(e layout.Extent) bool {
			mapped += uint64(e.Length)
			if !e.Foreign {
				own += uint64(e.Length)
			}
			return true
		})
		if mapped != c.d.mapped || own != c.d.own {
			c.find(Leak, 0, "the disk maps %d blocks, %d of them own; its header counts %d and %d", mapped, own, c.d.mapped, c.d.own)
		}
	}
}
