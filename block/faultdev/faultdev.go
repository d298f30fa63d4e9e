// Package faultdev wraps a block.Device and makes chosen operations go wrong: they
// fail, wait, tear, get lost, land elsewhere or later, or lie about a comparison.
// Rules are plain data, and every injection is logged.
//
// It has no randomness, no clock and no goroutine. It does not simulate power
// failure or several hosts (simdev does), and it is no block.Fencer.
//
// Invariants: an operation that no rule meets goes to the wrapped device
// unchanged; at most one rule acts on an operation; malformed operations and those
// of an ended context are not counted.
//
// Lock order: Device.mu is the only lock, not held while an operation waits or
// runs.
package faultdev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"basalt/block"
)

// ErrInjected is what operations return that fail by a rule without an error of
// its own.
var ErrInjected = errors.New("faultdev: injected fault")

// maxInjections bounds the log; the oldest entries go first.
const maxInjections = 4096

// Injection tells what one rule did to one operation.
type Injection struct {
	Rule   int // index in the rules given to New
	Effect Effect
	Op     Ops         // one operation
	Span   block.Range // as the caller asked for; empty for Flush
}

// Device is the faulty device.
type Device struct {
	dev   block.Device
	rules []Rule

	mu     sync.Mutex // guards all below
	met    []int      // operations that each rule has met
	log    []Injection
	queue  []*held // delayed and late operations, in order of arrival
	closed bool
	moved  chan struct{} // closed and replaced when queue or closed changes
}

// held is an operation that waits for Release.
type held struct {
	late bool // its caller has gone; Release carries it out
	call call // of a late one
}

// call is one operation.
type call struct {
	op      Ops
	span    block.Range
	data    []byte
	compare []byte
}

// New wraps dev. The rules are tried in order. It panics on a rule without a known
// effect, which would test nothing.
func New(dev block.Device, rules ...Rule) *Device {
	for i, r := range rules {
		if r.Effect.meets() == 0 {
			panic(fmt.Sprintf("faultdev: rule %d has effect %d", i, int(r.Effect)))
		}
	}
	return &Device{dev: dev, rules: slices.Clone(rules), met: make([]int, len(rules)), moved: make(chan struct{})}
}

// Injections is the log so far, at most the last 4096 entries.
func (d *Device) Injections() []Injection {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.log)
}

// Held is the number of operations that wait for Release.
func (d *Device) Held() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.queue)
}

// AwaitHeld waits until at least n operations wait for Release.
func (d *Device) AwaitHeld(ctx context.Context, n int) error {
	for {
		d.mu.Lock()
		have, moved := len(d.queue), d.moved
		d.mu.Unlock()
		if have >= n {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return fmt.Errorf("faultdev: %d of %d operations are held: %w", have, n, ctx.Err())
		}
	}
}

// Release carries out the late operations in order of their arrival, and then lets
// the delayed ones go on. It returns the errors of the late ones, which nobody else
// will see, joined.
func (d *Device) Release(ctx context.Context) error {
	d.mu.Lock()
	queue := d.queue
	d.queue = nil
	d.mu.Unlock()
	var errs []error
	for _, h := range queue {
		if h.late {
			errs = append(errs, d.execute(ctx, h.call))
		}
	}
	d.mu.Lock()
	d.wakeLocked()
	d.mu.Unlock()
	return errors.Join(errs...)
}

func (d *Device) wakeLocked() {
	close(d.moved)
	d.moved = make(chan struct{})
}

// match counts the operation with each rule that it meets, and returns the first
// of them that is due, nil if none is.
func (d *Device) match(c call) *Rule {
	d.mu.Lock()
	defer d.mu.Unlock()
	var due *Rule
	for i := range d.rules {
		r := &d.rules[i]
		if !r.meets(c) {
			continue
		}
		d.met[i]++
		if due != nil || r.Nth != 0 && r.Nth != d.met[i] {
			continue
		}
		due = r
		if len(d.log) == maxInjections {
			d.log = d.log[1:]
		}
		d.log = append(d.log, Injection{Rule: i, Effect: r.Effect, Op: c.op, Span: c.span})
	}
	return due
}

// do carries the operation out, or does to it what a rule says.
func (d *Device) do(ctx context.Context, c call) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	d.mu.Lock()
	closed := d.closed
	d.mu.Unlock()
	if closed {
		return d.closedError()
	}
	if err := d.check(c); err != nil {
		return err
	}
	r := d.match(c)
	if r == nil {
		return d.execute(ctx, c)
	}
	switch r.Effect {
	case FailBefore:
		return r.failure()
	case FailAfter:
		_ = d.execute(ctx, c) // the reply is lost, whatever it says
		return r.failure()
	case Delay:
		if err := d.delay(ctx); err != nil {
			return err
		}
		return d.execute(ctx, c)
	case Late:
		return d.postpone(c, r)
	case Torn:
		return d.tear(ctx, c, r)
	case Lost:
		return nil
	case Misdirect:
		c.span.OffBytes = r.ToBytes
		return d.execute(ctx, c)
	case BlindCAW:
		return d.dev.WriteFUA(ctx, c.data, c.span.OffBytes)
	default:
		panic(fmt.Sprintf("faultdev: effect %d", int(r.Effect)))
	}
}

func (d *Device) check(c call) error {
	switch c.op {
	case Flush:
		return nil
	case CAW:
		return d.dev.Geometry().CheckUnit(c.span.OffBytes, c.compare, c.data)
	default:
		return d.dev.Geometry().Check(c.span.OffBytes, c.span.LenBytes)
	}
}

func (d *Device) execute(ctx context.Context, c call) error {
	switch c.op {
	case Read:
		return d.dev.ReadAt(ctx, c.data, c.span.OffBytes)
	case Write:
		return d.dev.WriteAt(ctx, c.data, c.span.OffBytes)
	case FUA:
		return d.dev.WriteFUA(ctx, c.data, c.span.OffBytes)
	case Flush:
		return d.dev.Flush(ctx)
	case Zeroes:
		return d.dev.WriteZeroes(ctx, c.span.OffBytes, c.span.LenBytes)
	case Discard:
		return d.dev.Discard(ctx, c.span.OffBytes, c.span.LenBytes)
	case CAW:
		return d.dev.CompareAndWrite(ctx, c.span.OffBytes, c.compare, c.data)
	default:
		panic(fmt.Sprintf("faultdev: operation %d", uint(c.op)))
	}
}

// delay waits for Release.
func (d *Device) delay(ctx context.Context) error {
	h := &held{}
	d.mu.Lock()
	d.queue = append(d.queue, h)
	d.wakeLocked()
	for {
		moved, closed := d.moved, d.closed
		i := slices.Index(d.queue, h)
		d.mu.Unlock()
		switch {
		case closed:
			return d.closedError()
		case i < 0:
			return nil
		}
		select {
		case <-moved:
			d.mu.Lock()
		case <-ctx.Done():
			d.mu.Lock()
			d.queue = slices.DeleteFunc(d.queue, func(o *held) bool { return o == h })
			d.mu.Unlock()
			return ctx.Err()
		}
	}
}

// postpone keeps a copy of the operation for Release, and fails it now.
func (d *Device) postpone(c call, r *Rule) error {
	c.data, c.compare = bytes.Clone(c.data), bytes.Clone(c.compare)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.queue = append(d.queue, &held{late: true, call: c})
	d.wakeLocked()
	return r.failure()
}

// tear carries out the leading blocks only.
func (d *Device) tear(ctx context.Context, c call, r *Rule) error {
	n := min(c.span.LenBytes, int64(r.Blocks)*int64(d.dev.Geometry().LogicalBytes))
	c.span.LenBytes = n
	if c.data != nil {
		c.data = c.data[:n]
	}
	if err := d.execute(ctx, c); err != nil {
		return err
	}
	return r.Err
}

func (d *Device) closedError() error { return fmt.Errorf("faultdev: %w", block.ErrClosed) }

// Geometry is the wrapped device's.
func (d *Device) Geometry() block.Geometry { return d.dev.Geometry() }

// ReadAt implements block.Device.
func (d *Device) ReadAt(ctx context.Context, p []byte, offBytes int64) error {
	return d.do(ctx, call{op: Read, span: block.Range{OffBytes: offBytes, LenBytes: int64(len(p))}, data: p})
}

// WriteAt implements block.Device.
func (d *Device) WriteAt(ctx context.Context, p []byte, offBytes int64) error {
	return d.do(ctx, call{op: Write, span: block.Range{OffBytes: offBytes, LenBytes: int64(len(p))}, data: p})
}

// WriteFUA implements block.Device.
func (d *Device) WriteFUA(ctx context.Context, p []byte, offBytes int64) error {
	return d.do(ctx, call{op: FUA, span: block.Range{OffBytes: offBytes, LenBytes: int64(len(p))}, data: p})
}

// Flush implements block.Device.
func (d *Device) Flush(ctx context.Context) error { return d.do(ctx, call{op: Flush}) }

// WriteZeroes implements block.Device.
func (d *Device) WriteZeroes(ctx context.Context, offBytes, lenBytes int64) error {
	return d.do(ctx, call{op: Zeroes, span: block.Range{OffBytes: offBytes, LenBytes: lenBytes}})
}

// Discard implements block.Device.
func (d *Device) Discard(ctx context.Context, offBytes, lenBytes int64) error {
	return d.do(ctx, call{op: Discard, span: block.Range{OffBytes: offBytes, LenBytes: lenBytes}})
}

// CompareAndWrite implements block.Device.
func (d *Device) CompareAndWrite(ctx context.Context, offBytes int64, compare, write []byte) error {
	return d.do(ctx, call{op: CAW, span: block.Range{OffBytes: offBytes, LenBytes: int64(len(write))}, data: write, compare: compare})
}

// Close closes the wrapped device. Delayed operations return ErrClosed, late ones
// never land.
func (d *Device) Close() error {
	d.mu.Lock()
	d.closed = true
	d.queue = nil
	d.wakeLocked()
	d.mu.Unlock()
	return d.dev.Close()
}
