package simdev

import (
	"context"
	"fmt"
	"slices"

	"basalt/block"
)

// handleState tells whether a host can use its handle.
type handleState int

const (
	live   handleState = iota
	closed             // by Close, or by a power failure of the LUN
	dead               // the host was killed
)

// Handle is one host's access to the LUN. It implements block.Device and
// block.Fencer (FencePR).
type Handle struct {
	lun  *LUN
	name string

	// The following are guarded by lun.mu.
	state     handleState
	frozen    bool
	fenced    bool
	key       *key // registered by Guard
	hold      *Hold
	calls     int // calls in progress; Close waits for them
	stopAfter int // changes until the host dies; negative: never
	stats     Stats
}

// Name is what the handle was opened with.
func (h *Handle) Name() string { return h.name }

// Stats returns the handle's counts since it was opened or LUN.ResetStats.
func (h *Handle) Stats() Stats {
	h.lun.mu.Lock()
	defer h.lun.mu.Unlock()
	return h.stats
}

// Geometry gives the LUN's properties.
func (h *Handle) Geometry() block.Geometry {
	h.lun.mu.Lock()
	defer h.lun.mu.Unlock()
	return h.lun.geometryLocked()
}

// Kill is the sudden death of the host: nothing more is submitted, and calls in
// progress return ErrHostDead. What a Hold has in flight was submitted before and
// can still land. A registered key stays.
func (h *Handle) Kill() {
	h.lun.mu.Lock()
	defer h.lun.mu.Unlock()
	h.endLocked(dead)
	h.lun.wakeLocked()
}

// StopAfter kills the host once n more of its operations other than reads have
// reached the LUN; 0 kills it now. The n-th still succeeds.
func (h *Handle) StopAfter(n int) {
	h.lun.mu.Lock()
	defer h.lun.mu.Unlock()
	h.stopAfter = n
	if n == 0 {
		h.endLocked(dead)
		h.lun.wakeLocked()
	}
}

// endLocked takes the handle out of use. Power failure of the LUN also loses what
// is in flight; death of the host does not.
func (h *Handle) endLocked(s handleState) {
	if h.state == live {
		h.state = s
	}
	if s == closed {
		h.abortHeldLocked(h.closedError())
	}
}

// Freeze stops the host before its next submission, reads included, until Thaw.
func (h *Handle) Freeze() { h.setFrozen(true) }

// Thaw ends Freeze.
func (h *Handle) Thaw() { h.setFrozen(false) }

func (h *Handle) setFrozen(v bool) {
	h.lun.mu.Lock()
	defer h.lun.mu.Unlock()
	h.frozen = v
	h.lun.wakeLocked()
}

// Close refuses what a Freeze had stopped, and waits for other calls in progress.
// It does not withdraw the key; only Unguard and Fence do.
func (h *Handle) Close() error {
	l := h.lun
	l.mu.Lock()
	defer l.mu.Unlock()
	if h.state != live {
		return h.closedError()
	}
	h.state = closed
	l.wakeLocked()
	for h.calls > 0 {
		_ = l.waitLocked(context.Background()) // a background context never ends
	}
	if h.key == nil && h.hold == nil {
		l.handles = slices.DeleteFunc(l.handles, func(o *Handle) bool { return o == h })
	}
	return nil
}

func (h *Handle) closedError() error {
	return fmt.Errorf("simdev: host %s: %w", h.name, block.ErrClosed)
}

// usableLocked is nil when the host may submit.
func (h *Handle) usableLocked() error {
	switch h.state {
	case closed:
		return h.closedError()
	case dead:
		return fmt.Errorf("simdev: host %s: %w", h.name, ErrHostDead)
	}
	return nil
}

// enterLocked passes the submit boundary: it waits while the host is frozen.
func (h *Handle) enterLocked(ctx context.Context) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := h.usableLocked(); err != nil {
			return err
		}
		if !h.frozen {
			return nil
		}
		if err := h.lun.waitLocked(ctx); err != nil {
			return err
		}
	}
}

// waitLocked gives mu up until something has moved or ctx has ended.
func (l *LUN) waitLocked(ctx context.Context) error {
	moved := l.moved
	l.mu.Unlock()
	defer l.mu.Lock()
	select {
	case <-moved:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// ReadAt fills p from offBytes.
func (h *Handle) ReadAt(ctx context.Context, p []byte, offBytes int64) error {
	return h.call(ctx, &command{op: opRead, span: block.Range{OffBytes: offBytes, LenBytes: int64(len(p))}, data: p})
}

// WriteAt writes p at offBytes into the LUN's cache.
func (h *Handle) WriteAt(ctx context.Context, p []byte, offBytes int64) error {
	return h.call(ctx, &command{op: opWrite, span: block.Range{OffBytes: offBytes, LenBytes: int64(len(p))}, data: p})
}

// WriteFUA writes p at offBytes durably.
func (h *Handle) WriteFUA(ctx context.Context, p []byte, offBytes int64) error {
	return h.call(ctx, &command{op: opFUA, span: block.Range{OffBytes: offBytes, LenBytes: int64(len(p))}, data: p})
}

// Flush makes all completed changes durable, those of other hosts too.
func (h *Handle) Flush(ctx context.Context) error {
	return h.call(ctx, &command{op: opFlush})
}

// WriteZeroes zeroes the range in the LUN's cache and frees its memory.
func (h *Handle) WriteZeroes(ctx context.Context, offBytes, lenBytes int64) error {
	return h.call(ctx, &command{op: opZeroes, span: block.Range{OffBytes: offBytes, LenBytes: lenBytes}})
}

// Discard makes the range read as Options.DiscardGarbage says.
func (h *Handle) Discard(ctx context.Context, offBytes, lenBytes int64) error {
	return h.call(ctx, &command{op: opDiscard, span: block.Range{OffBytes: offBytes, LenBytes: lenBytes}})
}

// CompareAndWrite replaces a unit durably.
func (h *Handle) CompareAndWrite(ctx context.Context, offBytes int64, compare, write []byte) error {
	return h.call(ctx, &command{op: opCAW, span: block.Range{OffBytes: offBytes, LenBytes: int64(len(write))}, data: write, compare: compare})
}
