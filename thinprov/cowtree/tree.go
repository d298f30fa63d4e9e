package cowtree

import "basalt/thinprov/layout"

// Tree is a version of a tree. The zero Tree is empty.
type Tree[E Entry] struct {
	root *Node[E]
}

// FromPointer is the tree whose root p points to.
func FromPointer[E Entry](p layout.Pointer) Tree[E] {
	if p.IsNil() {
		return Tree[E]{}
	}
	p.Key = 0
	return Tree[E]{root: &Node[E]{ptr: p}}
}

// Root is the root node, nil when the tree is empty.
func (t Tree[E]) Root() *Node[E] { return t.root }

// Pointer refers to the root; it is nil for an empty tree.
func (t Tree[E]) Pointer() layout.Pointer {
	if t.root == nil {
		return layout.Pointer{}
	}
	return t.root.ptr
}

// Leaf is the leaf whose range holds the key, nil if the way to it is not in memory.
func (t Tree[E]) Leaf(key uint64) *Node[E] {
	n := t.root
	for n != nil && n.loaded && n.ptr.Level > 0 {
		n = n.kids[n.kidOf(key)].node
	}
	if n == nil || !n.loaded {
		return nil
	}
	return n
}

// Need returns the first hole on the way to the leaves of [lo,hi), nil if all are
// in memory.
func (t Tree[E]) Need(lo, hi uint64) *Hole[E] {
	if t.root == nil || lo >= hi {
		return nil
	}
	return t.root.need(0, MaxKey, lo, hi)
}

func (n *Node[E]) need(nlo, nhi, lo, hi uint64) *Hole[E] {
	if !n.loaded {
		return &Hole[E]{Node: n, lo: nlo, hi: nhi}
	}
	if n.ptr.Level == 0 {
		return nil
	}
	for i := n.kidOf(lo); i < len(n.kids); i++ {
		klo, khi := n.rangeOf(i, nlo, nhi)
		if klo >= hi {
			break
		}
		if h := n.kids[i].node.need(klo, khi, lo, hi); h != nil {
			return h
		}
	}
	return nil
}

// Scan calls visit for each entry that overlaps [lo,hi), in order and unclipped,
// until it returns false. At a hole it stops and returns it.
func (t Tree[E]) Scan(lo, hi uint64, visit func(E) bool) *Hole[E] {
	return t.ScanAfter(lo, hi, 0, visit)
}

// ScanAfter is Scan without the subtrees that were born at or before the given
// epoch. Other entries of that age may still be visited.
func (t Tree[E]) ScanAfter(lo, hi, birth uint64, visit func(E) bool) *Hole[E] {
	if t.root == nil || lo >= hi {
		return nil
	}
	h, _ := t.root.scan(0, MaxKey, lo, hi, birth, visit)
	return h
}

func (n *Node[E]) scan(nlo, nhi, lo, hi, birth uint64, visit func(E) bool) (*Hole[E], bool) {
	if birth > 0 && n.ptr.Birth <= birth {
		return nil, true
	}
	if !n.loaded {
		return &Hole[E]{Node: n, lo: nlo, hi: nhi}, false
	}
	if n.ptr.Level == 0 {
		for i := firstAfter(n.leaf, lo); i < len(n.leaf) && n.leaf[i].Key() < hi; i++ {
			if !visit(n.leaf[i]) {
				return nil, false
			}
		}
		return nil, true
	}
	for i := n.kidOf(lo); i < len(n.kids); i++ {
		klo, khi := n.rangeOf(i, nlo, nhi)
		if klo >= hi {
			break
		}
		if h, more := n.kids[i].node.scan(klo, khi, lo, hi, birth, visit); !more {
			return h, false
		}
	}
	return nil, true
}

// Made calls visit for every node that was made in generation gen, children first.
// A node that two trees share is visited in both.
func (t Tree[E]) Made(gen uint64, visit func(*Node[E])) {
	if t.root != nil {
		t.root.made(gen, visit)
	}
}

// made relies on this: whoever has a child of generation gen is of it too.
func (n *Node[E]) made(gen uint64, visit func(*Node[E])) {
	if n.gen != gen {
		return
	}
	for _, c := range n.kids {
		c.node.made(gen, visit)
	}
	visit(n)
}

// Nodes walks the tree, parents first, and descends below a node if visit returns
// true. A node is shown before it is loaded; to descend into one that is not loaded
// ends the walk with the hole.
func (t Tree[E]) Nodes(visit func(n *Node[E], lo, hi uint64) bool) *Hole[E] {
	if t.root == nil {
		return nil
	}
	return t.root.nodes(0, MaxKey, visit)
}

func (n *Node[E]) nodes(lo, hi uint64, visit func(*Node[E], uint64, uint64) bool) *Hole[E] {
	if !visit(n, lo, hi) {
		return nil
	}
	if !n.loaded {
		return &Hole[E]{Node: n, lo: lo, hi: hi}
	}
	for i, c := range n.kids {
		klo, khi := n.rangeOf(i, lo, hi)
		if h := c.node.nodes(klo, khi, visit); h != nil {
			return h
		}
	}
	return nil
}

// Walk visits the nodes of the tree, parents first, loading them as it goes. enter
// decides whether a node is visited at all, before it is loaded; load fills a hole,
// or leaves it, and then nothing below it is visited.
func (t Tree[E]) Walk(enter func(n *Node[E]) bool, load func(*Hole[E]) error, visit func(n *Node[E])) error {
	if t.root == nil {
		return nil
	}
	return t.root.walk(0, MaxKey, enter, load, visit)
}

func (n *Node[E]) walk(lo, hi uint64, enter func(*Node[E]) bool, load func(*Hole[E]) error, visit func(*Node[E])) error {
	if !enter(n) {
		return nil
	}
	if !n.loaded {
		if err := load(&Hole[E]{Node: n, lo: lo, hi: hi}); err != nil || !n.loaded {
			return err
		}
	}
	visit(n)
	for i, c := range n.kids {
		klo, khi := n.rangeOf(i, lo, hi)
		if err := c.node.walk(klo, khi, enter, load, visit); err != nil {
			return err
		}
	}
	return nil
}

// Entries are the entries of a loaded leaf. They must not be changed.
func (n *Node[E]) Entries() []E { return n.leaf }

// Holds reports whether t contains the node n of another version of the tree; lo
// and hi are n's range there. A hole means that it cannot be told yet.
//
// It looks where a key inside n leads to: if n is in t, every entry below n lies
// in n's range in t, and so does every separator inside n.
func (t Tree[E]) Holds(n *Node[E], lo, hi uint64) (bool, *Hole[E]) {
	key, h := n.innerKey(lo, hi)
	if h != nil {
		return false, h
	}
	at, alo, ahi := t.root, uint64(0), MaxKey
	for at != nil && at.ptr.Level > n.ptr.Level {
		if Same(at, n) {
			return true, nil
		}
		if !at.loaded {
			return false, &Hole[E]{Node: at, lo: alo, hi: ahi}
		}
		i := at.kidOf(key)
		alo, ahi = at.rangeOf(i, alo, ahi)
		at = at.kids[i].node
	}
	return at != nil && Same(at, n), nil
}

func (n *Node[E]) innerKey(lo, hi uint64) (uint64, *Hole[E]) {
	for {
		switch {
		case !n.loaded:
			return 0, &Hole[E]{Node: n, lo: lo, hi: hi}
		case n.ptr.Level == 0:
			return n.leaf[0].Key(), nil
		case len(n.kids) > 1:
			return n.kids[len(n.kids)-1].key, nil
		}
		n = n.kids[0].node
	}
}
