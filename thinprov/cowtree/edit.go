package cowtree

import (
	"slices"

	"basalt/thinprov/layout"
)

// Editor says what an edit may change in place, and hears what it replaces.
type Editor struct {
	Epoch    uint64           // birth of the nodes that the edit makes
	OwnAfter uint64           // nodes born later, and not foreign, belong to this tree alone
	Gen      uint64           // nodes of an older generation may be on their way to media
	Freed    func(blk uint64) // a node's address is no longer part of the tree
	Made     func()           // a node without an address came into being
}

func (ed *Editor) owns(p *layout.Pointer) bool { return !p.Foreign && p.Birth > ed.OwnAfter }

// drop ends n's part in the tree.
func (ed *Editor) drop(p *layout.Pointer) {
	if p.Block != 0 && ed.owns(p) {
		ed.Freed(p.Block)
	}
}

// inPlace returns n if it may be changed, else a clone in its stead.
func inPlace[E Entry](ed *Editor, n *Node[E]) *Node[E] {
	if ed.owns(&n.ptr) && n.gen == ed.Gen {
		n.ptr.Birth = ed.Epoch
		return n
	}
	c := newNode[E](ed, n.ptr.Level)
	c.leaf = append(make([]E, 0, len(n.leaf)+8), n.leaf...)
	c.kids = append(make([]kid[E], 0, len(n.kids)+2), n.kids...)
	ed.drop(&n.ptr)
	return c
}

func newNode[E Entry](ed *Editor, level uint8) *Node[E] {
	ed.Made()
	return &Node[E]{ptr: layout.Pointer{Birth: ed.Epoch, Level: level}, gen: ed.Gen, loaded: true}
}

// edit is one call of Tree.Edit.
type edit[E Entry] struct {
	kind   *Kind[E]
	ed     *Editor
	lo, hi uint64
	change func(leaf []E, lo, hi uint64) []E
}

// Edit replaces what lies in [lo,hi). For each leaf that the range touches, change
// gets the leaf's entries and the part of the range that is the leaf's, and returns
// the new entries; it may use the old ones' memory. Entries that it adds must lie
// within that part. All nodes that Need reports must be loaded.
func (t *Tree[E]) Edit(kind *Kind[E], ed *Editor, lo, hi uint64, change func(leaf []E, lo, hi uint64) []E) {
	e := edit[E]{kind: kind, ed: ed, lo: lo, hi: hi, change: change}
	if t.root == nil {
		t.root = newNode[E](ed, 0)
	}
	level := t.root.ptr.Level
	out := e.node(t.root, 0, MaxKey)
	for len(out) > 1 {
		level++
		out = e.parents(out, level, 0)
	}
	t.root = nil
	if len(out) == 0 {
		return
	}
	t.root = out[0].node
	for t.root.loaded && t.root.ptr.Level > 0 && len(t.root.kids) == 1 {
		ed.drop(&t.root.ptr)
		t.root = t.root.kids[0].node
	}
}

// node edits n, whose range is [nlo,nhi), and returns what takes its place.
func (e *edit[E]) node(n *Node[E], nlo, nhi uint64) []kid[E] {
	if !n.loaded {
		panic("cowtree: edit of a node that is not loaded")
	}
	n = inPlace(e.ed, n)
	if n.ptr.Level > 0 {
		return e.inner(n, nlo, nhi)
	}
	n.leaf = e.change(n.leaf, max(e.lo, nlo), min(e.hi, nhi))
	if len(n.leaf) == 0 {
		return nil
	}
	most := e.kind.maxLeaf()
	if len(n.leaf) <= most {
		return []kid[E]{{key: nlo, node: n}}
	}
	// A leaf that grows at the tree's end stays full: sequential writes fill it up.
	cuts := splits(len(n.leaf), most, nhi == MaxKey && n.leaf[len(n.leaf)-1].Key() >= e.lo)
	all := n.leaf
	out := make([]kid[E], 0, len(cuts))
	for i, from := range cuts {
		to := len(all)
		if i+1 < len(cuts) {
			to = cuts[i+1]
		}
		part, key := n, nlo
		if i > 0 {
			part, key = newNode[E](e.ed, 0), all[from].Key()
		}
		part.leaf = slices.Clone(all[from:to])
		out = append(out, kid[E]{key: key, node: part})
	}
	return out
}

// inner edits the children of n, which may be changed, and returns what takes n's
// place.
func (e *edit[E]) inner(n *Node[E], nlo, nhi uint64) []kid[E] {
	first := n.kidOf(e.lo)
	last := first
	for last+1 < len(n.kids) && n.kids[last+1].key < e.hi {
		last++
	}
	var repl []kid[E]
	for i := first; i <= last; i++ {
		klo, khi := n.rangeOf(i, nlo, nhi)
		repl = append(repl, e.node(n.kids[i].node, klo, khi)...)
	}
	n.kids = slices.Replace(n.kids, first, last+1, repl...)
	if len(n.kids) == 0 {
		return nil
	}
	n.kids[0].key = nlo
	e.mergeAround(n, first, first+len(repl))
	if len(n.kids) <= layout.MaxPointers {
		return []kid[E]{{key: nlo, node: n}}
	}
	kids := n.kids
	n.kids = nil
	return e.spread(n, kids, nlo)
}

// spread distributes too many children over n and new siblings.
func (e *edit[E]) spread(n *Node[E], kids []kid[E], nlo uint64) []kid[E] {
	cuts := splits(len(kids), layout.MaxPointers, false)
	out := make([]kid[E], 0, len(cuts))
	for i, from := range cuts {
		to := len(kids)
		if i+1 < len(cuts) {
			to = cuts[i+1]
		}
		part, key := n, nlo
		if i > 0 {
			part, key = newNode[E](e.ed, n.ptr.Level), kids[from].key
		}
		part.kids = slices.Clone(kids[from:to])
		out = append(out, kid[E]{key: key, node: part})
	}
	return out
}

// parents puts a level above kids.
func (e *edit[E]) parents(kids []kid[E], level uint8, nlo uint64) []kid[E] {
	if level > layout.MaxLevel {
		panic("cowtree: tree too high")
	}
	return e.spread(newNode[E](e.ed, level), kids, nlo)
}

// splits cuts n items into parts of at most most, evenly, or with full parts first.
func splits(n, most int, fullFirst bool) []int {
	parts := (n + most - 1) / most
	cuts := make([]int, 0, parts)
	for i := range parts {
		if fullFirst {
			cuts = append(cuts, i*most)
		} else {
			cuts = append(cuts, i*n/parts)
		}
	}
	return cuts
}

// mergeAround joins small children at [from-1,to] of n with a neighbour, where both
// are in memory and belong to this tree alone.
func (e *edit[E]) mergeAround(n *Node[E], from, to int) {
	i := max(from-1, 0)
	for end := to; i < end && i+1 < len(n.kids); {
		a, b := n.kids[i].node, n.kids[i+1].node
		if !e.mergeable(a, b) {
			i++
			continue
		}
		m := inPlace(e.ed, a)
		bk := b.kids
		if len(bk) > 0 {
			bk = slices.Clone(bk)
			bk[0].key = n.kids[i+1].key
		}
		m.leaf = append(m.leaf, b.leaf...)
		m.kids = append(m.kids, bk...)
		e.ed.drop(&b.ptr)
		n.kids[i].node = m
		n.kids = slices.Delete(n.kids, i+1, i+2)
		end--
	}
}

func (e *edit[E]) mergeable(a, b *Node[E]) bool {
	if !a.loaded || !b.loaded || !e.ed.owns(&a.ptr) || !e.ed.owns(&b.ptr) {
		return false
	}
	most := e.kind.maxLeaf()
	if a.ptr.Level > 0 {
		most = layout.MaxPointers
	}
	la, lb := len(a.leaf)+len(a.kids), len(b.leaf)+len(b.kids)
	return min(la, lb) <= most/4 && la+lb <= most*3/4
}
