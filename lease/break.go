package lease

import (
	"context"
	"errors"
	"time"

	"basalt/block"
)

// Break makes a generation of a slot dead: it watches its silence for a full
// window, or learns that it is proven gone, and cuts it off. It returns nil when
// the generation is dead, a *HolderError with ErrAlive when it showed a sign of
// life or with ErrUnfenced when no method can cut it off. It takes at least the
// lease that the holder advertises, unless that is gone. When ctx ends, a break
// may be left half done; whoever breaks the generation next finishes it.
func (s *Session) Break(ctx context.Context, slot int, generation uint32) error {
	report := s.breakObserved(ctx, slot, generation, 0, Window{})
	if report.Err == nil && !report.ByOther {
		s.tell(report, false)
	}
	return report.Err
}

// ConfirmDown is Break with a person who vouches that the holder is down. The
// window is observed in full, and Options.Drain waited for late writes; only the
// fence is replaced. ErrAlive: the person is wrong.
func (s *Session) ConfirmDown(ctx context.Context, slot int, generation uint32) error {
	return s.breakObserved(ctx, slot, generation, s.opts.Drain, Window{}).Err
}

func (s *Session) breakObserved(ctx context.Context, slot int, generation uint32, drain time.Duration, seen Window) BreakReport {
	report := BreakReport{Slot: slot, Generation: generation}
	if report.Err = s.area.checkSlot(slot); report.Err != nil {
		return report
	}
	if slot == s.slot && generation == s.generation {
		report.HostName = s.opts.HostName
		report.Err = &HolderError{Err: ErrAlive, Slot: slot, Generation: generation, HostName: s.opts.HostName, ClaimedAt: s.claimedAt, Offers: s.fencer.Kinds()}
		return report
	}
	if report.Err = s.lockBreak(ctx, slot); report.Err != nil {
		return report
	}
	defer s.unlockBreak(slot)
	gate := s.device.gate
	io := breakIO{
		peer: s.peer, dev: s.device,
		leased: func() (bool, uint64) { return gate.open(), gate.lapses.Load() },
	}
	return io.run(ctx, NewBreaker(BreakerConfig{
		Slot: slot, Generation: generation,
		BySlot: uint8(s.slot), ByGeneration: s.generation,
		Period: s.opts.Period, Kinds: s.fencer.Kinds(), Drain: drain,
	}, seen))
}

// lockBreak lets one break of a slot run at a time: two of one session could not
// tell their KILLs apart.
func (s *Session) lockBreak(ctx context.Context, slot int) error {
	for {
		s.mu.Lock()
		running, ok := s.breaking[slot]
		if !ok {
			s.breaking[slot] = make(chan struct{})
			s.mu.Unlock()
			return nil
		}
		s.mu.Unlock()
		select {
		case <-running:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *Session) unlockBreak(slot int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.breaking[slot])
	delete(s.breaking, slot)
}

// breakIO performs a Breaker's actions in the caller's goroutine.
type breakIO struct {
	peer
	dev    block.Device          // gated, but for a breaker without a slot
	leased func() (bool, uint64) // own lease valid, and how often it has lapsed
}

func (io breakIO) run(ctx context.Context, b *Breaker) BreakReport {
	ev := BreakerEvent{Kind: BreakerTick}
	for {
		a := b.Step(io.clk.Now(), ev)
		if a.Kind == EndBreak {
			return b.Report()
		}
		next, err := io.act(ctx, b.cfg, a)
		if err != nil {
			r := b.Report()
			r.Err = err
			return r
		}
		ev = next
	}
}

func (io breakIO) act(ctx context.Context, cfg BreakerConfig, a BreakerAction) (BreakerEvent, error) {
	if !a.Resolute && ctx.Err() != nil {
		return BreakerEvent{}, ctx.Err()
	}
	if a.Resolute {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), 2*io.opts.Lease)
		defer cancel()
	}
	switch a.Kind {
	case PollSlot:
		return io.poll(ctx, cfg, !a.Resolute)
	case WaitUntil:
		timer := io.clk.NewTimer(max(0, a.Until.Sub(io.clk.Now())))
		defer timer.Stop()
		select {
		case <-timer.C:
			return BreakerEvent{Kind: BreakerTick}, nil
		case <-ctx.Done():
			return BreakerEvent{}, ctx.Err()
		}
	case SwapRegister:
		now, err := io.area.swapRegister(ctx, io.dev, cfg.Slot, a.Old, a.Next, io.opts.Nonce)
		if errors.Is(err, ErrLost) || errors.Is(err, block.ErrClosed) {
			return BreakerEvent{}, err
		}
		return BreakerEvent{Kind: Swapped, Image: now.img, Register: now.reg, Err: err}, nil
	case FenceHolder:
		return BreakerEvent{Kind: Fenced, Err: io.fencer.Fence(ctx, a.Holder)}, nil
	case EndBreak:
	}
	panic("lease: a breaker's end is not an I/O")
}

func (io breakIO) poll(ctx context.Context, cfg BreakerConfig, askGone bool) (BreakerEvent, error) {
	p := pollSlot(ctx, io.peer, io.dev, cfg.Slot, io.leased)
	if errors.Is(p.Err, ErrLost) || errors.Is(p.Err, block.ErrClosed) {
		return BreakerEvent{}, p.Err
	}
	ev := BreakerEvent{Kind: Polled, Poll: p}
	r := p.Register
	if !askGone || p.Err != nil || r.Generation != cfg.Generation || r.Fencers&cfg.Kinds == 0 {
		return ev, nil
	}
	gone, err := io.fencer.Gone(ctx, holderOf(cfg.Slot, r))
	if err != nil {
		// No proof: the window decides.
		io.log.Debug("whether the holder is gone cannot be told", "victim", cfg.Slot, "err", err)
		gone = false
	}
	ev.Gone = gone
	return ev, nil
}

// pollSlot looks at a slot once.
func pollSlot(ctx context.Context, o peer, dev block.Device, slot int, leased func() (bool, uint64)) Poll {
	before, lapses := leased()
	p := Poll{Issued: o.clk.Now()}
	reg, err := o.area.readRegister(ctx, dev, slot)
	if err == nil {
		var damaged *block.CorruptError
		p.Heartbeat, err = o.area.readHeartbeat(ctx, dev, slot)
		if errors.As(err, &damaged) {
			// Its owner would have written a new one within a period.
			p.Heartbeat, err = Heartbeat{}, nil
		}
	}
	p.Image, p.Register, p.Err = reg.img, reg.reg, err
	after, lapsesAfter := leased()
	p.Leased = before && after && lapses == lapsesAfter
	p.Lapses = lapsesAfter
	p.Done = o.clk.Now()
	return p
}
