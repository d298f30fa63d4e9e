package thinprov

import (
	"context"
	"slices"
)

// rangeLock orders overlapping requests by arrival. A request holds its range of
// logical blocks from before it looks at the map until its change is durable. Its
// state is guarded by Disk.mu.
type rangeLock struct {
	queue []*heldRange // in order of arrival; the holders and, behind them, the waiting
}

type heldRange struct {
	lo, hi uint64        // blocks [lo,hi)
	wait   chan struct{} // closed when the range is held; nil if it was held at once
}

func (h *heldRange) overlaps(o *heldRange) bool { return h.lo < o.hi && o.lo < h.hi }

// enqueue joins the queue. The range is held when wait is nil or closed.
func (l *rangeLock) enqueue(lo, hi uint64) *heldRange {
	h := &heldRange{lo: lo, hi: hi}
	if slices.ContainsFunc(l.queue, h.overlaps) {
		h.wait = make(chan struct{})
	}
	l.queue = append(l.queue, h)
	return h
}

// release leaves the queue, whether the range was held or waited for, and lets those
// go on that nothing before them overlaps any more.
func (l *rangeLock) release(h *heldRange) {
	at := slices.Index(l.queue, h)
	l.queue = slices.Delete(l.queue, at, at+1)
	for i := at; i < len(l.queue); i++ {
		o := l.queue[i]
		if o.wait == nil || !o.overlaps(h) || slices.ContainsFunc(l.queue[:i], o.overlaps) {
			continue
		}
		select {
		case <-o.wait:
		default:
			close(o.wait)
		}
	}
}

// lockRange waits until all earlier requests for blocks of [lo,hi) have ended.
func (d *Disk) lockRange(ctx context.Context, lo, hi uint64) (*heldRange, error) {
	d.mu.Lock()
	h := d.ranges.enqueue(lo, hi)
	d.mu.Unlock()
	if h.wait == nil {
		return h, nil
	}
	select {
	case <-h.wait:
		return h, nil
	case <-ctx.Done():
		d.unlockRange(h)
		return nil, ctx.Err()
	}
}

func (d *Disk) unlockRange(h *heldRange) {
	d.mu.Lock()
	d.ranges.release(h)
	d.mu.Unlock()
}
