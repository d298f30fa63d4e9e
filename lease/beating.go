package lease

import (
	"context"
	"fmt"

	"basalt/block"
	"basalt/internal/clock"
)

// beatIO is one I/O of the Holder: the heartbeat write or the register read.
type beatIO struct {
	action HolderAction
	ctx    context.Context
}

// live is the session's goroutine. It drives the Holder, then ends the session's
// I/O: a lost generation closes the device without one further submit, after the
// operations in progress have ended.
func (s *Session) live(ctx context.Context) {
	defer close(s.ended)
	defer s.cancelIO()
	requests, answers := make(chan beatIO, 1), make(chan HolderEvent, 1)
	workerEnded := make(chan struct{})
	go func() {
		defer close(workerEnded)
		for io := range requests {
			answers <- s.perform(io)
		}
	}()
	d := &beatDriver{s: s, requests: requests, answers: answers}
	d.run(ctx)
	close(requests)
	<-workerEnded
	abandoned := s.quieted()
	if s.Err() == nil {
		if abandoned == nil {
			return
		}
		s.setLost(abandoned)
	}
	// No deadline: until its I/O has ended a lost generation must keep the device,
	// so that its slot's lock is not dropped under a write.
	if err := s.device.gate.drain(context.Background()); err != nil {
		panic("lease: drain without a deadline: " + err.Error())
	}
	if err := s.raw.Close(); err != nil {
		s.log.Warn("device of a lost generation", "close", err)
	}
}

// perform does one I/O on the device beneath the gate.
func (s *Session) perform(io beatIO) HolderEvent {
	switch io.action.Kind {
	case WriteHeartbeat:
		return HolderEvent{Kind: HolderWrote, Err: s.writeHeartbeat(io)}
	case ReadOwn:
		r, err := s.area.readRegister(io.ctx, s.raw, s.slot)
		return HolderEvent{Kind: HolderRead, Register: r.reg, Err: err}
	case ExtendLease, LapseLease, LoseLease, Called, Wake:
	}
	panic(fmt.Sprintf("lease: holder action %d is not an I/O", io.action.Kind))
}

func (s *Session) writeHeartbeat(io beatIO) error {
	b := block.AlignedBuffer(s.raw.Geometry().UnitBytes)
	off := s.area.beatOff(s.slot)
	h := Heartbeat{Generation: s.generation, Sequence: io.action.Sequence, Nonce: s.opts.Nonce(), WrittenAt: s.clk.Wall()}
	h.Encode(b, s.area.Volume, off)
	if s.clk.Now() > io.action.NotAfter {
		return ErrStale
	}
	return s.raw.WriteAt(io.ctx, b, off)
}

// beatDriver performs a Holder's actions. It has at most one I/O outstanding, so
// that neither channel ever blocks; a stuck device does not stop its clock.
type beatDriver struct {
	s        *Session
	requests chan<- beatIO
	answers  <-chan HolderEvent
	wake     clock.Instant
	overdue  clock.Instant      // when the outstanding I/O is given up
	cancel   context.CancelFunc // of the outstanding I/O; nil when there is none
	valid    bool               // the lease has been valid before
	lapsed   bool               // the lease has ended since
}

func (d *beatDriver) run(ctx context.Context) {
	s := d.s
	h := NewHolder(HolderConfig{Generation: s.generation, Claim: s.claim, Lease: s.opts.Lease, Period: s.opts.Period}, s.clk.Now())
	ev := HolderEvent{Kind: HolderTick}
	for {
		for _, a := range h.Step(s.clk.Now(), ev) {
			if !d.act(ctx, a) {
				return
			}
		}
		timer := s.clk.NewTimer(max(0, d.wake.Sub(s.clk.Now())))
		select {
		case <-timer.C:
			ev = HolderEvent{Kind: HolderTick}
			if s.clk.Now() >= d.overdue {
				d.giveUp()
			}
		case ev = <-d.answers:
			d.giveUp()
		case err := <-s.device.gate.fenced:
			ev = HolderEvent{Kind: HolderFenced, Err: err}
		case <-s.stop:
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

// giveUp releases the outstanding I/O's context; the I/O still has to answer.
func (d *beatDriver) giveUp() {
	if d.cancel != nil {
		d.cancel()
		d.cancel = nil
	}
}

// act performs one action and reports whether the session goes on.
func (d *beatDriver) act(ctx context.Context, a HolderAction) bool {
	s := d.s
	switch a.Kind {
	case WriteHeartbeat, ReadOwn:
		var io beatIO
		io.action = a
		io.ctx, d.cancel = context.WithCancel(ctx)
		d.overdue = s.clk.Now().Add(s.opts.IOBudget)
		d.requests <- io
	case ExtendLease:
		s.device.gate.extend(a.Until)
		if !d.valid {
			d.valid = true
			close(s.first)
		}
		if d.lapsed {
			d.lapsed = false
			s.log.Info("lease is valid again: I/O goes on")
		}
	case LapseLease:
		d.lapsed = true
		s.log.Warn("lease has ended: I/O waits until it is renewed")
	case Called:
		select {
		case s.calls <- struct{}{}:
		default:
		}
	case LoseLease:
		s.log.Error("generation lost: no further I/O", "err", a.Err)
		s.setLost(a.Err)
		return false
	case Wake:
		d.wake = a.Until
	}
	return true
}
