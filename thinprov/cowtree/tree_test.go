package cowtree_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"

	"basalt/thinprov/cowtree"
	"basalt/thinprov/layout"
)

// item is an entry of 1000 bytes, so that a leaf holds four and trees grow high.
type item struct{ key, value uint64 }

func (i item) Key() uint64 { return i.key }
func (i item) End() uint64 { return i.key + 1 }

var kind = cowtree.Kind[item]{
	ID: layout.TreeMap, Bytes: 1000,
	Put: func(b []byte, i item) {
		binary.LittleEndian.PutUint64(b, i.key)
		binary.LittleEndian.PutUint64(b[8:], i.value)
	},
	Get: func(b []byte) (item, error) {
		return item{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])}, nil
	},
}

var seed = layout.Seed{Volume: [16]byte{1}, Owner: layout.Ref{Slot: 2, Incarnation: 3}}

// bench is a tree, its older versions, and the media they lie on.
type bench struct {
	t     *testing.T
	tree  cowtree.Tree[item]
	ed    cowtree.Editor
	seq   uint64
	next  uint64
	media map[uint64][]byte
	freed map[uint64]bool
}

func newBench(t *testing.T) *bench {
	b := &bench{t: t, next: layout.FirstBlock, media: make(map[uint64][]byte), freed: make(map[uint64]bool)}
	b.ed = cowtree.Editor{Epoch: 1, Gen: 1, Made: func() {}, Freed: func(blk uint64) {
		if b.freed[blk] {
			t.Fatalf("block %d freed twice", blk)
		}
		b.freed[blk] = true
	}}
	return b
}

// fill loads holes until f has none.
func (b *bench) fill(f func() *cowtree.Hole[item]) {
	b.t.Helper()
	for h := f(); h != nil; h = f() {
		c, err := h.Decode(&kind, seed, b.media[h.Node.Block()])
		if err != nil {
			b.t.Fatal(err)
		}
		h.Install(c)
	}
}

func (b *bench) put(key, value uint64) {
	b.fill(func() *cowtree.Hole[item] { return b.tree.Need(key, key+1) })
	b.tree.Edit(&kind, &b.ed, key, key+1, func(leaf []item, _, _ uint64) []item {
		var out []item
		for _, i := range leaf {
			if i.key < key {
				out = append(out, i)
			}
		}
		if value != 0 {
			out = append(out, item{key, value})
		}
		for _, i := range leaf {
			if i.key > key {
				out = append(out, i)
			}
		}
		return out
	})
}

func (b *bench) erase(lo, hi uint64) {
	b.fill(func() *cowtree.Hole[item] { return b.tree.Need(lo, hi) })
	b.tree.Edit(&kind, &b.ed, lo, hi, func(leaf []item, lo, hi uint64) []item {
		var out []item
		for _, i := range leaf {
			if i.key < lo || i.key >= hi {
				out = append(out, i)
			}
		}
		return out
	})
}

// save writes what is new, as a checkpoint does.
func (b *bench) save(trees ...cowtree.Tree[item]) {
	gen := b.ed.Gen
	b.ed.Gen++
	b.seq++
	for _, t := range trees {
		t.Made(gen, func(n *cowtree.Node[item]) {
			if n.Block() == 0 {
				n.Place(b.next)
				b.next++
			}
		})
		t.Made(gen, func(n *cowtree.Node[item]) {
			if n.Pointer().Seq == 0 {
				img := make([]byte, layout.BlockBytes)
				n.Encode(&kind, seed, 1, b.seq, img)
				b.media[n.Block()] = img
			}
		})
	}
}

func (b *bench) compare(t cowtree.Tree[item], want map[uint64]uint64) {
	b.t.Helper()
	got := make(map[uint64]uint64)
	last := uint64(0)
	b.fill(func() *cowtree.Hole[item] {
		clear(got)
		last = 0
		return t.Scan(0, cowtree.MaxKey, func(i item) bool {
			if i.key < last {
				b.t.Fatalf("key %d after %d", i.key, last)
			}
			got[i.key], last = i.value, i.key
			return true
		})
	})
	if fmt.Sprint(got) != fmt.Sprint(want) {
		b.t.Fatalf("tree holds %d items, want %d: %v, want %v", len(got), len(want), got, want)
	}
}

func copyOf(m map[uint64]uint64) map[uint64]uint64 {
	out := make(map[uint64]uint64, len(m))
	for k, v := range m {
		out[k] = v
	}
	return out
}

// Random edits with snapshots, checkpoints and reloads: every version keeps its
// content, and what is freed is in no version that is left.
func TestVersionsKeepTheirContent(t *testing.T) {
	for s := range uint64(60) {
		t.Run(fmt.Sprint(s), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(s, 1))
			b := newBench(t)
			keys := 200 + rng.Uint64N(3000)
			want := make(map[uint64]uint64)
			type version struct {
				tree cowtree.Tree[item]
				want map[uint64]uint64
			}
			var old []version
			all := func() []cowtree.Tree[item] {
				out := []cowtree.Tree[item]{b.tree}
				for _, v := range old {
					out = append(out, v.tree)
				}
				return out
			}
			for i := range uint64(1500) {
				switch k := rng.IntN(100); {
				case k < 80:
					key := rng.Uint64N(keys)
					b.put(key, i+1)
					want[key] = i + 1
				case k < 90:
					key := rng.Uint64N(keys)
					b.put(key, 0)
					delete(want, key)
				case k < 94:
					lo := rng.Uint64N(keys)
					hi := lo + 1 + rng.Uint64N(keys/4)
					b.erase(lo, hi)
					for key := lo; key < hi; key++ {
						delete(want, key)
					}
				case k < 96 && len(old) < 6:
					old = append(old, version{b.tree, copyOf(want)})
					b.ed.OwnAfter = b.ed.Epoch
					b.ed.Epoch++
				case k < 98:
					b.save(all()...)
				case k == 98: // forget what is in memory
					b.save(all()...)
					for i := range old {
						old[i].tree = cowtree.FromPointer[item](old[i].tree.Pointer())
					}
					b.tree = cowtree.FromPointer[item](b.tree.Pointer())
				}
			}
			b.save(all()...)
			b.compare(b.tree, want)
			for _, v := range old {
				b.compare(v.tree, v.want)
			}
			for _, v := range all() {
				v.Nodes(func(n *cowtree.Node[item], lo, hi uint64) bool {
					if b.freed[n.Block()] {
						t.Fatalf("node at %d is in use but was freed", n.Block())
					}
					return true
				})
			}
		})
	}
}

// Holds finds exactly the nodes that two versions share.
func TestHoldsTellsSharedNodes(t *testing.T) {
	for s := range uint64(40) {
		rng := rand.New(rand.NewPCG(s, 2))
		b := newBench(t)
		for i := range 400 + rng.Uint64N(2500) {
			b.put(rng.Uint64N(5000), i+1)
		}
		before := b.tree
		b.ed.OwnAfter = b.ed.Epoch
		b.ed.Epoch++
		for i := range rng.Uint64N(60) {
			switch rng.IntN(3) {
			case 0:
				b.put(rng.Uint64N(5000), i+1)
			case 1:
				b.put(rng.Uint64N(5000), 0)
			case 2:
				lo := rng.Uint64N(5000)
				b.erase(lo, lo+rng.Uint64N(400))
			}
		}
		b.save(b.tree, before)
		now := make(map[uint64]bool)
		b.tree.Nodes(func(n *cowtree.Node[item], _, _ uint64) bool { now[n.Block()] = true; return true })
		before.Nodes(func(n *cowtree.Node[item], lo, hi uint64) bool {
			shared, hole := b.tree.Holds(n, lo, hi)
			if hole != nil || shared != now[n.Block()] {
				t.Fatalf("seed %d: Holds tells %v of a node of level %d, want %v", s, shared, n.Level(), now[n.Block()])
			}
			return true
		})
	}
}

func TestTreeGrowsAndShrinks(t *testing.T) {
	b := newBench(t)
	for i := range uint64(3000) {
		b.put(i, i+1)
	}
	if level := b.tree.Root().Level(); level < 2 {
		t.Fatalf("3000 items, four to a leaf: root of level %d", level)
	}
	b.save(b.tree)
	b.erase(10, 2990)
	if level := b.tree.Root().Level(); level > 1 {
		t.Errorf("20 items left: root of level %d", level)
	}
	b.erase(0, 3000)
	if b.tree.Root() != nil {
		t.Error("an empty tree has a root")
	}
	if len(b.freed) != len(b.media) {
		t.Errorf("%d of %d nodes freed", len(b.freed), len(b.media))
	}
}

func TestDamagedNodesAreRefused(t *testing.T) {
	b := newBench(t)
	for i := range uint64(300) {
		b.put(i, i+1)
	}
	b.save(b.tree)
	p := b.tree.Pointer()
	whole := b.media[p.Block]
	for i := range whole {
		bad := append([]byte{}, whole...)
		bad[i] ^= 0x10
		tree := cowtree.FromPointer[item](p)
		if _, err := tree.Need(0, 1).Decode(&kind, seed, bad); err == nil {
			t.Fatalf("byte %d changed, node accepted", i)
		}
	}
	for what, s := range map[string]layout.Seed{"volume": {Owner: seed.Owner}, "owner": {Volume: seed.Volume}} {
		tree := cowtree.FromPointer[item](p)
		if _, err := tree.Need(0, 1).Decode(&kind, s, whole); err == nil {
			t.Errorf("node of another %s accepted", what)
		}
	}
	older := p
	older.Seq--
	tree := cowtree.FromPointer[item](older)
	if _, err := tree.Need(0, 1).Decode(&kind, seed, whole); err == nil {
		t.Error("node of another version accepted")
	}
}
