package simdev

import (
	"bytes"
	"context"
	"fmt"

	"basalt/block"
)

type opcode int

const (
	opRead opcode = iota
	opWrite
	opFUA
	opFlush
	opZeroes
	opDiscard
	opCAW
)

// command is one operation on its way to the LUN.
type command struct {
	op      opcode
	span    block.Range // empty for opFlush
	data    []byte      // read into, or written; the caller's until a Hold takes the command
	compare []byte      // of opCAW

	held   bool // a Hold has it or had it
	ended  bool // executed or aborted; err is the outcome
	err    error
	change int // ordinal among the changes that reached the LUN; 0: it did not, or is a read
}

// call carries a command out for the handle's host and returns its outcome.
func (h *Handle) call(ctx context.Context, c *command) error {
	l := h.lun
	l.mu.Lock()
	h.calls++
	err := h.submitLocked(ctx, c)
	h.calls--
	if h.state != live {
		l.wakeLocked() // Close may be waiting for the last call
	}
	mine := !c.held // else the Hold that let it land has told
	l.mu.Unlock()
	if mine {
		l.tell(c)
	}
	return err
}

// submitLocked passes the command to the LUN, or to the Hold that keeps it.
func (h *Handle) submitLocked(ctx context.Context, c *command) error {
	if err := h.enterLocked(ctx); err != nil {
		return err
	}
	if err := h.lun.checkLocked(c); err != nil {
		return fmt.Errorf("simdev: host %s: %w", h.name, err)
	}
	if c.op != opFlush && c.span.LenBytes == 0 {
		return nil
	}
	if c.op != opRead && h.hold != nil {
		return h.hold.keepLocked(ctx, c)
	}
	h.lun.executeLocked(h, c)
	return c.err
}

func (l *LUN) checkLocked(c *command) error {
	g := l.geometryLocked()
	switch c.op {
	case opFlush:
		return nil
	case opCAW:
		return g.CheckUnit(c.span.OffBytes, c.compare, c.data)
	default:
		return g.Check(c.span.OffBytes, c.span.LenBytes)
	}
}

// executeLocked is the arrival of a command at the LUN. Reads of a fenced host
// succeed, as under a Write Exclusive reservation.
func (l *LUN) executeLocked(h *Handle, c *command) {
	c.ended = true
	if c.op != opRead && h.fenced {
		c.err = h.fencedError()
		return
	}
	for _, s := range []*Stats{&l.stats, &h.stats} {
		s.count(c)
	}
	if c.op == opRead {
		l.visible.read(c.data, c.span.OffBytes)
		return
	}
	l.changes++
	c.change = l.changes
	switch c.op {
	case opWrite:
		l.changeLocked(newWrite(c.data, c.span.OffBytes))
	case opFUA:
		l.writeThroughLocked(c)
	case opFlush:
		l.cache.flush()
	case opZeroes:
		l.changeLocked(&change{kind: changeZero, span: c.span})
	case opDiscard:
		l.changeLocked(l.discardOf(c))
	case opCAW:
		l.compareAndWriteLocked(h, c)
	default:
		panic(fmt.Sprintf("simdev: opcode %d", c.op))
	}
	if h.stopAfter > 0 {
		if h.stopAfter--; h.stopAfter == 0 {
			h.endLocked(dead)
			l.wakeLocked()
		}
	}
}

func (l *LUN) changeLocked(ch *change) {
	ch.apply(l.visible, ch.span)
	l.cache.add(ch)
}

func (l *LUN) writeThroughLocked(c *command) {
	ch := newWrite(c.data, c.span.OffBytes)
	ch.forced = true
	l.changeLocked(ch)
}

func (l *LUN) discardOf(c *command) *change {
	if !l.opts.DiscardGarbage {
		return &change{kind: changeZero, span: c.span}
	}
	return &change{kind: changeGarble, span: c.span, seed: mix(l.opts.Seed ^ uint64(c.change))}
}

func (l *LUN) compareAndWriteLocked(h *Handle, c *command) {
	have := make([]byte, len(c.compare))
	l.visible.read(have, c.span.OffBytes)
	if !bytes.Equal(have, c.compare) {
		c.err = fmt.Errorf("simdev: host %s: unit at %d: %w", h.name, c.span.OffBytes, block.ErrMiscompare)
		l.stats.Miscompares++
		h.stats.Miscompares++
		return
	}
	l.writeThroughLocked(c)
	l.stats.WrittenBytes += c.span.LenBytes
	h.stats.WrittenBytes += c.span.LenBytes
}

func (s *Stats) count(c *command) {
	switch c.op {
	case opRead:
		s.Reads++
		s.ReadBytes += c.span.LenBytes
	case opWrite:
		s.Writes++
		s.WrittenBytes += c.span.LenBytes
	case opFUA:
		s.FUAs++
		s.WrittenBytes += c.span.LenBytes
	case opFlush:
		s.Flushes++
	case opZeroes:
		s.Zeroes++
	case opDiscard:
		s.Discards++
	case opCAW:
		s.CAWs++
	}
}

// tell runs the hook of OnChange after a command that reached the LUN.
func (l *LUN) tell(c *command) {
	if c.change == 0 {
		return
	}
	l.mu.Lock()
	hook := l.onChange
	l.mu.Unlock()
	if hook != nil {
		hook(c.change)
	}
}
