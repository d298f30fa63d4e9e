package thinprov

import (
	"context"
	"fmt"
	"sync"

	"basalt/thinprov/cowtree"
	"basalt/thinprov/layout"
)

// View reads a snapshot. Its content never changes.
type View struct {
	rd   *reader
	tree mapTree
	size int64
	uuid [16]byte

	mu     sync.Mutex // guards closed and active; innermost
	closed bool
	active sync.WaitGroup
	done   func() // once, when closed and no read is in progress
}

// View opens a snapshot of the disk for reading. It ends before the disk does.
func (d *Disk) View(_ context.Context, uuid [16]byte) (*View, error) {
	if err := d.begin(false); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	s, err := d.visibleLocked(uuid)
	if err != nil {
		d.endLocked()
		return nil, err
	}
	s.views++
	return &View{rd: &d.rd, tree: s.root, size: s.SizeBytes, uuid: s.UUID, done: func() {
		d.mu.Lock()
		s.views--
		d.mu.Unlock()
		d.end()
	}}, nil
}

// OpenView opens a published snapshot for reading, by the header payload of its
// object. The caller keeps a hold on that object, so that its origin frees nothing.
func OpenView(ctx context.Context, store Store, published []byte) (*View, error) {
	p, err := layout.DecodePublished(store.Volume(), published)
	if err != nil {
		return nil, fmt.Errorf("thinprov: open view: %w", err)
	}
	p.Root.Foreign = true // whoever reads it through a published object owns none of it
	v := &View{
		rd:   &reader{store: store, seed: layout.Seed{Volume: store.Volume(), Owner: store.Self()}, mu: new(sync.Mutex)},
		tree: cowtree.FromPointer[layout.Extent](p.Root), size: p.SizeBytes, uuid: p.UUID, done: func() {},
	}
	// The root is read now: a payload that leads nowhere is found at once.
	err = v.rd.with(ctx, func() *mapHole { return v.tree.Need(0, 1) })
	if err != nil {
		return nil, fmt.Errorf("thinprov: open view: %w", err)
	}
	return v, nil
}

func (v *View) begin() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		return ErrClosed
	}
	v.active.Add(1)
	return nil
}

// SizeBytes is the snapshot's logical size.
func (v *View) SizeBytes() int64 { return v.size }

// UUID is the snapshot's id.
func (v *View) UUID() [16]byte { return v.uuid }

func (v *View) root() (mapTree, error) { return v.tree, nil }

// ReadAt fills p from offBytes. Holes read as zeros.
func (v *View) ReadAt(ctx context.Context, p []byte, offBytes int64) error {
	if err := v.begin(); err != nil {
		return err
	}
	defer v.active.Done()
	if err := checkRange(v.size, offBytes, int64(len(p))); err != nil || len(p) == 0 {
		return err
	}
	return v.rd.readAt(ctx, v.root, p, offBytes)
}

// Map tells how a range is mapped, in ascending runs, until emit returns false.
func (v *View) Map(ctx context.Context, offBytes, lenBytes int64, emit func(Run) bool) error {
	if err := v.begin(); err != nil {
		return err
	}
	defer v.active.Done()
	if err := checkRange(v.size, offBytes, lenBytes); err != nil || lenBytes == 0 {
		return err
	}
	return v.rd.runs(ctx, v.root, offBytes, lenBytes, emit)
}

// Close waits for the reads in progress and ends the view.
func (v *View) Close() error {
	v.mu.Lock()
	was := v.closed
	v.closed = true
	v.mu.Unlock()
	if was {
		return ErrClosed
	}
	v.active.Wait()
	v.done()
	return nil
}
