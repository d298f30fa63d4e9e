package thinprov

import (
	"fmt"

	"basalt/block"
	"basalt/thinprov/layout"
)

// run is a span of consecutive physical blocks within one slab.
type run struct{ first, count uint64 }

// A block of an owned slab is used (a tree in memory reaches it), reserved (given
// out, not yet mapped), held (freed, not yet reusable) or free.
type slab struct {
	num                  uint64 // address / SlabBytes
	kind                 layout.SlabKind
	used, reserved, held bitmap
	doubt                bitmap // a write to the block failed and may still land: never free in this session
	class                slabClass
	prev, next           *slab // in the list of its class
}

// slabClass sorts data slabs by what they can still give.
type slabClass uint8

const (
	classFull  slabClass = iota
	classHoles           // some free blocks, no free chunk
	classChunk           // at least one free chunk
	classEmpty           // nothing but free blocks
	classes
)

// taken are the blocks that are not free.
func (s *slab) taken() bitmap {
	var m bitmap
	for w := range m {
		m[w] = s.used[w] | s.reserved[w] | s.held[w]
	}
	return m
}

// firstChunk is the first free chunk of 16 blocks, or -1.
func firstChunk(taken bitmap) int {
	for c := range layout.BlocksPerSlab / layout.ChunkBlocks {
		if uint16(taken[c/4]>>(c%4*16)) == 0 {
			return c
		}
	}
	return -1
}

func classOf(taken bitmap) slabClass {
	switch {
	case taken == bitmap{}:
		return classEmpty
	case firstChunk(taken) >= 0:
		return classChunk
	case taken.count() < layout.BlocksPerSlab:
		return classHoles
	}
	return classFull
}

// allocator gives out the blocks of the disk's slabs. It is guarded by Disk.mu.
type allocator struct {
	slabs map[uint64]*slab // by number
	tree  []*slab          // of kind tree, in order of arrival
	lists [classes]slabList
	dirty map[uint64]bool // numbers of slabs whose entry in the slab table is stale

	dataSlabs          int
	freeData, usedData uint64 // blocks in data slabs
	freeTree           uint64 // blocks in tree slabs
	doubts             uint64 // writes that failed in this session
	treeCursor         int    // index into tree where the last block was found
}

// slabList is a list of data slabs of one class.
type slabList struct {
	head, tail *slab
	n          int
}

func newAllocator() *allocator {
	return &allocator{slabs: make(map[uint64]*slab), dirty: make(map[uint64]bool)}
}

func (l *slabList) push(s *slab) {
	s.prev, s.next = l.tail, nil
	if l.tail != nil {
		l.tail.next = s
	} else {
		l.head = s
	}
	l.tail = s
	l.n++
}

func (l *slabList) remove(s *slab) {
	if s.prev != nil {
		s.prev.next = s.next
	} else {
		l.head = s.next
	}
	if s.next != nil {
		s.next.prev = s.prev
	} else {
		l.tail = s.prev
	}
	s.prev, s.next = nil, nil
	l.n--
}

// add makes s the disk's.
func (a *allocator) add(s *slab) error {
	if a.slabs[s.num] != nil {
		return &block.CorruptError{Object: "slab table", OffBytes: int64(s.num) * SlabBytes, Reason: "the slab is listed twice"}
	}
	a.slabs[s.num] = s
	switch s.kind {
	case layout.SlabData:
		a.dataSlabs++
		s.class = classOf(s.taken())
		a.lists[s.class].push(s)
	case layout.SlabTree:
		a.tree = append(a.tree, s)
	}
	a.count(s, +1)
	return nil
}

// remove ends the disk's ownership of s.
func (a *allocator) remove(s *slab) {
	delete(a.slabs, s.num)
	a.count(s, -1)
	switch s.kind {
	case layout.SlabData:
		a.dataSlabs--
		a.lists[s.class].remove(s)
	case layout.SlabTree:
		for i, t := range a.tree {
			if t == s {
				a.tree = append(a.tree[:i], a.tree[i+1:]...)
				break
			}
		}
		a.treeCursor = 0
	}
	a.dirty[s.num] = true
}

// count adds s to the totals, or with -1 takes it out.
func (a *allocator) count(s *slab, sign int64) {
	taken := s.taken()
	free := uint64(sign) * (layout.BlocksPerSlab - taken.count())
	switch s.kind {
	case layout.SlabData:
		a.freeData += free
		a.usedData += uint64(sign) * s.used.count()
	case layout.SlabTree:
		a.freeTree += free
	}
}

// change runs f on a slab and keeps totals and lists in step.
func (a *allocator) change(s *slab, f func()) {
	a.count(s, -1)
	f()
	a.count(s, +1)
	if s.kind != layout.SlabData {
		return
	}
	if c := classOf(s.taken()); c != s.class {
		a.lists[s.class].remove(s)
		s.class = c
		a.lists[c].push(s)
	}
}

// owner is the slab that holds the run, nil if it is not the disk's or the run
// leaves it.
func (a *allocator) owner(r run) *slab {
	s := a.slabs[r.first/layout.BlocksPerSlab]
	if s == nil || r.first%layout.BlocksPerSlab+r.count > layout.BlocksPerSlab {
		return nil
	}
	return s
}

func bounds(r run) (from, to uint64) {
	from = r.first % layout.BlocksPerSlab
	return from, from + r.count
}

func (a *allocator) markDirty(s *slab) { a.dirty[s.num] = true }

// reserve takes free blocks.
func (a *allocator) reserve(r run) {
	s := a.owner(r)
	from, to := bounds(r)
	a.change(s, func() { s.reserved.set(from, to) })
}

// unreserve gives back what reserve took. Blocks in doubt are held.
func (a *allocator) unreserve(r run) {
	s := a.owner(r)
	from, to := bounds(r)
	a.change(s, func() {
		s.reserved.clear(from, to)
		for w := range s.held {
			s.held[w] |= span(w, from, to) & s.doubt[w]
		}
	})
}

// use maps blocks that are reserved, or in a replay free.
func (a *allocator) use(r run) error {
	s := a.owner(r)
	from, to := bounds(r)
	switch {
	case s == nil || s.kind != layout.SlabData:
		return corruptBlock(r, "not in a data slab of the disk")
	case !s.used.none(from, to) || !s.held.none(from, to):
		return corruptBlock(r, "in use already")
	}
	a.change(s, func() {
		s.reserved.clear(from, to)
		s.used.set(from, to)
	})
	a.markDirty(s)
	return nil
}

// unuse frees blocks. They are held until letGo.
func (a *allocator) unuse(r run) error {
	s := a.owner(r)
	from, to := bounds(r)
	if s == nil || !s.used.all(from, to) {
		return corruptBlock(r, "freed but not in use")
	}
	a.change(s, func() {
		s.used.clear(from, to)
		s.held.set(from, to)
	})
	a.markDirty(s)
	return nil
}

// letGo makes held blocks free, except those in doubt.
func (a *allocator) letGo(r run) {
	s := a.owner(r)
	from, to := bounds(r)
	a.change(s, func() {
		for w := range s.held {
			s.held[w] &^= span(w, from, to) &^ s.doubt[w]
		}
	})
}

// suspect notes that a write to used or reserved blocks failed and may still land.
func (a *allocator) suspect(r run) {
	a.doubts++
	s := a.owner(r)
	from, to := bounds(r)
	s.doubt.set(from, to)
}

// suspects reports whether a failed write to one of the blocks may still land.
func (a *allocator) suspects(r run) bool {
	found := false
	if a.doubts > 0 {
		eachSlab(r, func(r run) {
			from, to := bounds(r)
			s := a.owner(r)
			found = found || s != nil && !s.doubt.none(from, to)
		})
	}
	return found
}

func corruptBlock(r run, reason string) error {
	return &block.CorruptError{Object: "block", OffBytes: int64(r.first) * BlockBytes, Reason: fmt.Sprintf("%d blocks %s", r.count, reason)}
}

// wish is where a logical run would like to go.
type wish struct {
	logical, count uint64
	chunk          uint64 // first block of the chunk that holds neighbours of the same 64 KiB; 0 if none
	before         uint64 // where the logical block before it lies; 0 if nowhere
	anyHole        bool   // the volume is full: take whatever is free
}

// place reserves blocks for the beginning of the wish, at the same offset in a 64
// KiB chunk as in the logical 64 KiB if it can. A result of length 0 asks for
// another slab.
func (a *allocator) place(w wish) run {
	at := w.logical % layout.ChunkBlocks
	most := min(w.count, layout.ChunkBlocks-at)
	if r := a.beside(w, at, most); r.count > 0 {
		a.reserve(r)
		return r
	}
	var r run
	if w.anyHole || a.freeData > a.usedData/4+slackBlocks {
		r = a.hole(w.count)
	}
	if r.count == 0 {
		r = a.chunk(at, most)
	}
	if r.count > 0 {
		a.reserve(r)
	}
	return r
}

// slackBlocks of free space, plus a quarter of what is used, are tolerated before
// holes are filled instead of taking fresh chunks.
const slackBlocks = 4 << 20 / BlockBytes

// beside looks for room next to the wish's neighbours.
func (a *allocator) beside(w wish, at, most uint64) run {
	first := uint64(0)
	switch {
	case w.chunk != 0:
		first = w.chunk + at
	case at == 0 && w.before != 0 && (w.before+1)%layout.ChunkBlocks == 0 && (w.before+1)%layout.BlocksPerSlab != 0:
		first = w.before + 1
	default:
		return run{}
	}
	s := a.owner(run{first, 1})
	if s == nil || s.kind != layout.SlabData {
		return run{}
	}
	taken := s.taken()
	i := first % layout.BlocksPerSlab
	if w.chunk == 0 && !taken.none(i, i+layout.ChunkBlocks) {
		return run{}
	}
	return run{first, taken.clearRun(i, most)}
}

// chunk takes the place at the given offset of a free chunk.
func (a *allocator) chunk(at, most uint64) run {
	s := a.lists[classChunk].head
	if s == nil {
		s = a.lists[classEmpty].head
	}
	if s == nil {
		return run{}
	}
	c := uint64(firstChunk(s.taken()))
	return run{s.num*layout.BlocksPerSlab + c*layout.ChunkBlocks + at, most}
}

// hole takes free blocks from the slab that has the least order to lose.
func (a *allocator) hole(most uint64) run {
	for _, c := range []slabClass{classHoles, classChunk, classEmpty} {
		if s := a.lists[c].head; s != nil {
			taken := s.taken()
			i := taken.firstClear(0)
			return run{s.num*layout.BlocksPerSlab + i, taken.clearRun(i, most)}
		}
	}
	return run{}
}

// treeBlock gives a free block of a tree slab to a node, or 0.
func (a *allocator) treeBlock() uint64 {
	for n := range a.tree {
		i := (a.treeCursor + n) % len(a.tree)
		s := a.tree[i]
		taken := s.taken()
		b := taken.firstClear(0)
		if b == layout.BlocksPerSlab {
			continue
		}
		a.treeCursor = i
		a.change(s, func() { s.used.set(b, b+1) })
		a.markDirty(s)
		return s.num*layout.BlocksPerSlab + b
	}
	return 0
}

// takeBack undoes treeBlock.
func (a *allocator) takeBack(blk uint64) {
	s := a.owner(run{blk, 1})
	from, to := bounds(run{blk, 1})
	a.change(s, func() { s.used.clear(from, to) })
	a.markDirty(s)
}
