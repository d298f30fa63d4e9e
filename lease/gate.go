package lease

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"basalt/block"
	"basalt/internal/clock"
)

// gate lets operations through while the lease is valid, holds them while it is
// in doubt, and fails them once it is lost.
//
// Invariant: no operation is submitted after shut is set; inflight counts exactly
// the operations between submit and the device's answer, so that shut and
// inflight == 0 mean that the device is quiet.
type gate struct {
	clk      clock.Clock
	until    atomic.Int64  // the lease's end, a clock.Instant; publishes nothing else
	shut     atomic.Bool   // set before err; never cleared
	inflight atomic.Int64  // see the invariant
	lapses   atomic.Uint64 // times that the lease came back after it had ended
	idle     chan struct{} // one token: inflight reached 0 while shut
	fenced   chan error    // one: the device refused this host for good

	mu      sync.Mutex    // guards changed, err
	changed chan struct{} // closed and replaced when the lease extends after its end, closed when err is set
	err     error         // why the gate is shut; ErrLost wins over block.ErrClosed
}

func newGate(clk clock.Clock) *gate {
	return &gate{clk: clk, idle: make(chan struct{}, 1), fenced: make(chan error, 1), changed: make(chan struct{})}
}

// open reports whether the lease is valid now.
func (g *gate) open() bool { return int64(g.clk.Now()) < g.until.Load() }

// extend moves the lease's end.
func (g *gate) extend(until clock.Instant) {
	lapsed := !g.open()
	g.until.Store(int64(until))
	if !lapsed {
		return
	}
	g.lapses.Add(1)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err == nil {
		close(g.changed)
		g.changed = make(chan struct{})
	}
}

// close shuts the gate: with block.ErrClosed operations in progress may still be
// acknowledged, with ErrLost nothing may.
func (g *gate) close(err error) {
	if errors.Is(err, ErrLost) {
		g.until.Store(0)
	}
	g.shut.Store(true)
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.err == nil:
		g.err = err
		close(g.changed)
	case errors.Is(err, ErrLost):
		g.err = err
	}
	if g.inflight.Load() == 0 {
		g.signalIdle()
	}
}

// drain waits, after close, until the device has answered every operation.
func (g *gate) drain(ctx context.Context) error {
	for g.inflight.Load() != 0 {
		select {
		case <-g.idle:
		case <-ctx.Done():
			return fmt.Errorf("lease: %d operations have not ended: %w", g.inflight.Load(), ctx.Err())
		}
	}
	g.signalIdle() // for whoever else drains
	return nil
}

func (g *gate) signalIdle() {
	select {
	case g.idle <- struct{}{}:
	default:
	}
}

// enter is the check before each submit. When it returns nil, leave must follow
// the device's answer.
func (g *gate) enter(ctx context.Context) error {
	for {
		g.inflight.Add(1)
		// Counted before shut is looked at: close either sees the count or is seen.
		if !g.shut.Load() && g.open() {
			return nil
		}
		g.leave()
		if err := g.wait(ctx); err != nil {
			return err
		}
	}
}

func (g *gate) leave() {
	if g.inflight.Add(-1) == 0 && g.shut.Load() {
		g.signalIdle()
	}
}

// exit follows the device's answer: an answer that tells something is given to
// the caller only while the lease is valid.
func (g *gate) exit(ctx context.Context, answer error) error {
	g.leave()
	switch {
	case answer == nil || errors.Is(answer, block.ErrMiscompare):
		for !g.open() {
			if err := g.wait(ctx); err != nil {
				return err
			}
		}
	case errors.Is(answer, block.ErrFenced):
		select {
		case g.fenced <- answer:
		default:
		}
	}
	return answer
}

// wait blocks until the lease is valid or the gate is shut.
func (g *gate) wait(ctx context.Context) error {
	g.mu.Lock()
	changed, err := g.changed, g.err
	g.mu.Unlock()
	if err != nil {
		return err
	}
	if g.open() {
		return nil
	}
	select {
	case <-changed:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("lease: in doubt: %w", ctx.Err())
	}
}

// gated is the device that a session's owner works on. See Session.Device.
type gated struct {
	raw  block.Device
	gate *gate
}

var _ block.Device = (*gated)(nil)

func (d *gated) Geometry() block.Geometry { return d.raw.Geometry() }

func (d *gated) ReadAt(ctx context.Context, p []byte, offBytes int64) error {
	if err := d.gate.enter(ctx); err != nil {
		return err
	}
	return d.gate.exit(ctx, d.raw.ReadAt(ctx, p, offBytes))
}

func (d *gated) WriteAt(ctx context.Context, p []byte, offBytes int64) error {
	if err := d.gate.enter(ctx); err != nil {
		return err
	}
	return d.gate.exit(ctx, d.raw.WriteAt(ctx, p, offBytes))
}

func (d *gated) WriteFUA(ctx context.Context, p []byte, offBytes int64) error {
	if err := d.gate.enter(ctx); err != nil {
		return err
	}
	return d.gate.exit(ctx, d.raw.WriteFUA(ctx, p, offBytes))
}

func (d *gated) Flush(ctx context.Context) error {
	if err := d.gate.enter(ctx); err != nil {
		return err
	}
	return d.gate.exit(ctx, d.raw.Flush(ctx))
}

func (d *gated) WriteZeroes(ctx context.Context, offBytes, lenBytes int64) error {
	if err := d.gate.enter(ctx); err != nil {
		return err
	}
	return d.gate.exit(ctx, d.raw.WriteZeroes(ctx, offBytes, lenBytes))
}

func (d *gated) Discard(ctx context.Context, offBytes, lenBytes int64) error {
	if err := d.gate.enter(ctx); err != nil {
		return err
	}
	return d.gate.exit(ctx, d.raw.Discard(ctx, offBytes, lenBytes))
}

func (d *gated) CompareAndWrite(ctx context.Context, offBytes int64, compare, write []byte) error {
	if err := d.gate.enter(ctx); err != nil {
		return err
	}
	return d.gate.exit(ctx, d.raw.CompareAndWrite(ctx, offBytes, compare, write))
}

// Close refuses further operations and waits for those in progress. The device
// beneath stays open for the session, whose Close closes it.
func (d *gated) Close() error {
	d.gate.close(fmt.Errorf("lease: %w", block.ErrClosed))
	return d.gate.drain(context.Background())
}
