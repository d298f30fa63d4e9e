package thinprov

import (
	"context"
	"fmt"
	"sync"

	"basalt/block"
	"basalt/thinprov/cowtree"
	"basalt/thinprov/layout"
)

type (
	mapTree = cowtree.Tree[layout.Extent]
	mapNode = cowtree.Node[layout.Extent]
	mapHole = cowtree.Hole[layout.Extent]
)

var mapKind = cowtree.Kind[layout.Extent]{
	ID: layout.TreeMap, Bytes: layout.ExtentBytes,
	Put: func(b []byte, e layout.Extent) { e.Put(b) },
	Get: layout.GetExtent,
	Foreign: func(e layout.Extent) layout.Extent {
		e.Foreign = true
		return e
	},
}

// Run is a span of a disk that is mapped, or a hole that reads as zeros.
type Run struct {
	OffBytes, LenBytes int64
	Mapped             bool
	Foreign            bool // the bytes belong to the clone's origin
}

// reader serves reads of map trees, loading their nodes as they are needed.
type reader struct {
	store Store
	seed  layout.Seed
	mu    *sync.Mutex // guards the trees and pins
	pins  pins
	ended func() // called under mu when an I/O has ended
}

// with runs f under mu, and again after loading what f lacked. f changes nothing
// before it returns nil.
func (r *reader) with(ctx context.Context, f func() *mapHole) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		h := f()
		if h == nil {
			return nil
		}
		if err := r.load(ctx, h); err != nil {
			return err
		}
	}
}

// load fills the hole. It gives up mu meanwhile. The node's block cannot be reused
// before the I/O has ended, so that what is read there is the node or damage.
func (r *reader) load(ctx context.Context, h *mapHole) error {
	phase := r.pins.enter()
	p := h.Node.Pointer()
	r.mu.Unlock()
	b := block.AlignedBuffer(BlockBytes)
	c, err := cowtree.Content[layout.Extent]{}, r.store.ReadAt(ctx, b, int64(p.Block)*BlockBytes)
	if err == nil {
		c, err = h.Decode(&mapKind, r.seed, b)
	}
	r.mu.Lock()
	r.leave(phase)
	if err != nil {
		return fmt.Errorf("thinprov: map of the disk: %w", err)
	}
	h.Install(c)
	return nil
}

// leave ends an I/O that pins.enter began. Needs mu.
func (r *reader) leave(phase uint64) {
	r.pins.leave(phase)
	if r.ended != nil {
		r.ended()
	}
}

// segment is a part of a request: count logical blocks at physical, or a hole.
type segment struct {
	logical, count, physical uint64 // physical 0: a hole
}

// segments appends the layout of the logical blocks [lo,hi) to dst, joining what is
// consecutive on media. Needs mu.
func segments(dst []segment, t mapTree, lo, hi uint64) ([]segment, *mapHole) {
	at := lo
	put := func(count, physical uint64) {
		if count == 0 {
			return
		}
		if n := len(dst); n > 0 {
			last := &dst[n-1]
			if physical == 0 && last.physical == 0 || physical != 0 && last.physical != 0 && last.physical+last.count == physical {
				last.count += count
				at += count
				return
			}
		}
		dst = append(dst, segment{at, count, physical})
		at += count
	}
	h := t.Scan(lo, hi, func(e layout.Extent) bool {
		put(max(e.Logical, lo)-at, 0)
		put(min(e.End(), hi)-at, e.Physical+(at-e.Logical))
		return true
	})
	if h != nil {
		return nil, h
	}
	put(hi-at, 0)
	return dst, nil
}

// readAt reads from the tree that f gives under mu.
func (r *reader) readAt(ctx context.Context, tree func() (mapTree, error), p []byte, offBytes int64) error {
	lo, hi := uint64(offBytes)/BlockBytes, (uint64(offBytes)+uint64(len(p))+BlockBytes-1)/BlockBytes
	var room [4]segment
	var segs []segment
	var phase uint64
	var refused error
	err := r.with(ctx, func() *mapHole {
		t, err := tree()
		if refused = err; err != nil {
			return nil
		}
		var h *mapHole
		if segs, h = segments(room[:0], t, lo, hi); h == nil {
			phase = r.pins.enter()
		}
		return h
	})
	if err != nil || refused != nil {
		return firstOf(err, refused)
	}
	for _, s := range segs {
		if err = r.readSegment(ctx, s, p, offBytes); err != nil {
			break
		}
	}
	r.mu.Lock()
	r.leave(phase)
	r.mu.Unlock()
	return err
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// readSegment fills the part of p, which begins at offBytes of the disk, that s
// covers.
func (r *reader) readSegment(ctx context.Context, s segment, p []byte, offBytes int64) error {
	from := max(int64(s.logical)*BlockBytes, offBytes)
	to := min(int64(s.logical+s.count)*BlockBytes, offBytes+int64(len(p)))
	part := p[from-offBytes : to-offBytes]
	if s.physical == 0 {
		clear(part)
		return nil
	}
	at := int64(s.physical)*BlockBytes + from - int64(s.logical)*BlockBytes
	return readBytes(ctx, r.store, part, at)
}

// readBytes reads at any multiple of 512, even from a device of 4096-byte blocks.
func readBytes(ctx context.Context, store Store, p []byte, at int64) error {
	l := int64(store.Geometry().LogicalBytes)
	from, to := at/l*l, (at+int64(len(p))+l-1)/l*l
	if from == at && to == at+int64(len(p)) {
		return store.ReadAt(ctx, p, at)
	}
	b := block.AlignedBuffer(int(to - from))
	if err := store.ReadAt(ctx, b, from); err != nil {
		return err
	}
	copy(p, b[at-from:])
	return nil
}

// mapStep is how many blocks of the map are looked at under mu at once.
const mapStep = 1 << 16

// runs tells how [offBytes, offBytes+lenBytes) is mapped, in order, whole blocks
// clipped to the range, until emit returns false.
func (r *reader) runs(ctx context.Context, tree func() (mapTree, error), offBytes, lenBytes int64, emit func(Run) bool) error {
	lo, hi := uint64(offBytes)/BlockBytes, (uint64(offBytes)+uint64(lenBytes)+BlockBytes-1)/BlockBytes
	var last Run // not emitted yet
	flush := func(next Run) bool {
		if last.LenBytes > 0 && last.Mapped == next.Mapped && last.Foreign == next.Foreign {
			last.LenBytes += next.LenBytes
			return true
		}
		done := last
		last = next
		return done.LenBytes == 0 || emit(done)
	}
	for at := lo; at < hi; {
		to := min(at+mapStep, hi)
		part, err := r.runsOf(ctx, tree, at, to)
		if err != nil {
			return err
		}
		for _, x := range part {
			end := min(x.OffBytes+x.LenBytes, offBytes+lenBytes)
			x.OffBytes = max(x.OffBytes, offBytes)
			x.LenBytes = end - x.OffBytes
			if !flush(x) {
				return nil
			}
		}
		at = to
	}
	if last.LenBytes > 0 {
		emit(last)
	}
	return nil
}

func (r *reader) runsOf(ctx context.Context, tree func() (mapTree, error), lo, hi uint64) ([]Run, error) {
	var out []Run
	var refused error
	err := r.with(ctx, func() *mapHole {
		t, err := tree()
		if refused = err; err != nil {
			return nil
		}
		out = out[:0]
		at := lo
		add := func(to uint64, mapped, foreign bool) {
			if to > at {
				out = append(out, Run{OffBytes: int64(at) * BlockBytes, LenBytes: int64(to-at) * BlockBytes, Mapped: mapped, Foreign: foreign})
				at = to
			}
		}
		h := t.Scan(lo, hi, func(e layout.Extent) bool {
			add(max(e.Logical, lo), false, false)
			add(min(e.End(), hi), true, e.Foreign)
			return true
		})
		add(hi, false, false)
		return h
	})
	return out, firstOf(err, refused)
}

// checkRange refuses spans that are not within a disk of sizeBytes or not a whole
// number of sectors.
func checkRange(sizeBytes, offBytes, lenBytes int64) error {
	return block.Geometry{SizeBytes: sizeBytes, LogicalBytes: SectorBytes}.Check(offBytes, lenBytes)
}
