// Package cowtree is a persistent B+tree of 4 KiB nodes: the extent map, the slab
// table and the snapshot table of a thin disk are three instances of it.
//
// A Tree is a value. Copying it freezes it, as long as Editor.OwnAfter of later
// edits is raised to the epoch of the copy: a node is changed in memory only if it
// was born after OwnAfter, is not foreign, and was made since the last freeze for a
// checkpoint (Editor.Gen); every other node is cloned first. So snapshots cost
// nothing, and a checkpoint encodes nodes while edits go on.
//
// Nodes come into memory when asked for: an operation that meets a node that is not
// loaded returns it as a Hole, having changed nothing, and the caller loads the
// hole and calls again. The package does no I/O and takes no lock; the caller
// serialises everything but Encode, which reads only frozen nodes.
//
// Invariants: keys of a node's entries ascend and lie, with the whole span of the
// entry, inside the range that its parents give it (an entry never crosses a node
// boundary). No node is empty; an empty tree has no root. A node of the current
// generation has only ancestors of that generation. Birth of a node ≥ birth of
// everything below it.
package cowtree

import (
	"fmt"
	"slices"

	"basalt/block"
	"basalt/thinprov/layout"
)

// MaxKey is the end of every tree's range.
const MaxKey = ^uint64(0)

// Entry is what leaves hold: a span of keys [Key, End).
type Entry interface {
	Key() uint64
	End() uint64
}

// Kind describes the entries of a tree.
type Kind[E Entry] struct {
	ID    layout.TreeKind
	Bytes int // of an encoded entry
	Put   func(b []byte, e E)
	Get   func(b []byte) (E, error)
	// Foreign returns e as it looks when read through a foreign pointer; nil for
	// trees that are never shared between objects.
	Foreign func(e E) E
}

func (k *Kind[E]) maxLeaf() int { return layout.NodeRoom / k.Bytes }

// Node is a node of a tree, in memory or known only by its pointer.
type Node[E Entry] struct {
	ptr    layout.Pointer // Key unused; Block is 0 while dirty
	gen    uint64         // of the Editor that made it; 0 when it was loaded
	loaded bool
	leaf   []E
	kids   []kid[E]
}

type kid[E Entry] struct {
	key  uint64 // low end of the node's range
	node *Node[E]
}

// Block is the node's address, 0 while it has none.
func (n *Node[E]) Block() uint64 { return n.ptr.Block }

// Birth is the epoch of the youngest change in or below the node.
func (n *Node[E]) Birth() uint64 { return n.ptr.Birth }

// Foreign reports whether the node belongs to another object.
func (n *Node[E]) Foreign() bool { return n.ptr.Foreign }

// Level is 0 for a leaf.
func (n *Node[E]) Level() uint8 { return n.ptr.Level }

// Pointer is how a parent refers to the node. Version and CRC are set once the node
// has been encoded.
func (n *Node[E]) Pointer() layout.Pointer { return n.ptr }

// Place gives a dirty node its address, or with 0 takes it back. The node may be
// encoded once the generation in which it was made is over.
func (n *Node[E]) Place(blk uint64) { n.ptr.Block = blk }

// Same reports whether a and b are one node, though perhaps loaded twice.
func Same[E Entry](a, b *Node[E]) bool {
	return a == b || a != nil && b != nil && a.ptr.Block != 0 && a.ptr.Block == b.ptr.Block
}

// Hole is a node that an operation needs and that is not in memory.
type Hole[E Entry] struct {
	Node   *Node[E]
	lo, hi uint64 // the range that its parents give it
}

// Low is the low end of the node's range.
func (h *Hole[E]) Low() uint64 { return h.lo }

// Content is a decoded node, ready to be installed.
type Content[E Entry] struct {
	leaf []E
	kids []kid[E]
}

// Decode checks b as the node of the hole. It changes nothing.
func (h *Hole[E]) Decode(k *Kind[E], seed layout.Seed, b []byte) (Content[E], error) {
	p := h.Node.ptr
	head, err := seed.OpenNode(b, k.ID, p, k.Bytes)
	if err != nil {
		return Content[E]{}, err
	}
	var c Content[E]
	if head.Level == 0 {
		err = c.decodeLeaf(k, b[layout.NodeHeadBytes:], head.Count, p, h.lo, h.hi)
	} else {
		err = c.decodeKids(b[layout.NodeHeadBytes:], head.Count, p, h.lo, h.hi)
	}
	if err != nil {
		return Content[E]{}, &block.CorruptError{Object: "tree node", OffBytes: int64(p.Block) * layout.BlockBytes, Reason: err.Error()}
	}
	return c, nil
}

func (c *Content[E]) decodeLeaf(k *Kind[E], b []byte, count int, p layout.Pointer, lo, hi uint64) error {
	c.leaf = make([]E, 0, count+8)
	for i := range count {
		e, err := k.Get(b[i*k.Bytes : (i+1)*k.Bytes])
		if err != nil {
			return err
		}
		if e.Key() < lo || e.End() > hi {
			return fmt.Errorf("entry %d to %d lies outside of %d to %d", e.Key(), e.End(), lo, hi)
		}
		lo = e.End()
		if p.Foreign && k.Foreign != nil {
			e = k.Foreign(e)
		}
		c.leaf = append(c.leaf, e)
	}
	return nil
}

func (c *Content[E]) decodeKids(b []byte, count int, p layout.Pointer, lo, hi uint64) error {
	c.kids = make([]kid[E], 0, count+4)
	stubs := make([]Node[E], count)
	for i := range count {
		q, err := layout.GetPointer(b[i*layout.PointerBytes:])
		if err != nil {
			return err
		}
		switch {
		case q.IsNil() || q.Level+1 != p.Level:
			return fmt.Errorf("pointer %d to level %d in level %d", i, q.Level, p.Level)
		case q.Key >= hi, i > 0 && q.Key <= c.kids[i-1].key:
			return fmt.Errorf("pointer %d of key %d is out of order", i, q.Key)
		case q.Birth > p.Birth:
			return fmt.Errorf("pointer %d is born in %d, its node in %d", i, q.Birth, p.Birth)
		}
		key := max(q.Key, lo)
		if i == 0 {
			key = lo // whatever lies below the first separator belongs to the first child
		}
		q.Key, q.Foreign = 0, q.Foreign || p.Foreign
		stubs[i].ptr = q
		c.kids = append(c.kids, kid[E]{key: key, node: &stubs[i]})
	}
	return nil
}

// Install puts what Decode returned into the hole, unless that was done meanwhile.
func (h *Hole[E]) Install(c Content[E]) {
	if n := h.Node; !n.loaded {
		n.leaf, n.kids, n.loaded = c.leaf, c.kids, true
	}
}

// Encode writes the placed node n into b and fixes its version and CRC. Its children
// have been encoded before.
func (n *Node[E]) Encode(k *Kind[E], seed layout.Seed, lockGen, seq uint64, b []byte) {
	clear(b)
	room := b[layout.NodeHeadBytes:]
	count := len(n.leaf)
	for i, e := range n.leaf {
		k.Put(room[i*k.Bytes:], e)
	}
	for i, c := range n.kids {
		p := c.node.ptr
		p.Key = c.key
		p.Put(room[i*layout.PointerBytes:])
	}
	if n.ptr.Level > 0 {
		count = len(n.kids)
	}
	n.ptr.LockGen, n.ptr.Seq = lockGen, seq
	n.ptr.CRC = seed.SealNode(b, n.ptr.Block, layout.NodeHead{
		LockGen: lockGen, Seq: seq, Birth: n.ptr.Birth, Owner: seed.Owner, Kind: k.ID, Level: n.ptr.Level, Count: count,
	})
}

// firstAfter is the index of the first entry whose end is above key.
func firstAfter[E Entry](leaf []E, key uint64) int {
	i, _ := slices.BinarySearchFunc(leaf, key, func(e E, k uint64) int {
		if e.End() <= k {
			return -1
		}
		return 1
	})
	return i
}

// kidOf is the index of the child whose range holds key.
func (n *Node[E]) kidOf(key uint64) int {
	i, found := slices.BinarySearchFunc(n.kids, key, func(c kid[E], k uint64) int {
		switch {
		case c.key < k:
			return -1
		case c.key > k:
			return 1
		}
		return 0
	})
	if found {
		return i
	}
	return max(i-1, 0)
}

// rangeOf is the range of child i of a node of range [lo,hi).
func (n *Node[E]) rangeOf(i int, lo, hi uint64) (uint64, uint64) {
	if i > 0 {
		lo = n.kids[i].key
	}
	if i+1 < len(n.kids) {
		hi = n.kids[i+1].key
	}
	return lo, hi
}
