package lease

import (
	"context"
	"errors"
	"sync"
	"time"

	"basalt/block"
)

const (
	// watchedNeighbours is how many live slots after the own one are watched: so
	// many hosts may die at once without anyone waiting for the survivors' turn.
	watchedNeighbours = 3
	// scanPeriods is how often, in periods, the registers of all slots are read to
	// find the neighbours.
	scanPeriods = 4
)

// Watch breaks the holders that die among the next live slots after the
// session's own, so that each is watched by several servers and no server reads
// all heartbeats. It reports every attempt to Options.OnBreak and the log, but for
// those that another server was faster with, and returns when ctx ends or the
// session is lost or closed.
func (s *Session) Watch(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	w := &watcher{s: s, watched: make(map[int]*watched)}
	defer w.breaks.Wait()
	defer cancel()
	for round := 0; ; round++ {
		if round%scanPeriods == 0 {
			if err := w.scan(ctx); isOver(err) {
				return err
			}
		}
		for _, slot := range w.order {
			if err := w.look(ctx, slot); isOver(err) {
				return err
			}
		}
		timer := s.clk.NewTimer(w.pause())
		select {
		case <-timer.C:
		case <-s.lost:
			timer.Stop()
			return s.Err()
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
	}
}

// pause is how long until the next look at the neighbours.
func (w *watcher) pause() time.Duration {
	now := w.s.clk.Now()
	at := now.Add(w.s.opts.Period)
	for _, n := range w.watched {
		if n.busy == nil {
			at = min(at, n.window.next(now, n.lease))
		}
	}
	return at.Sub(now)
}

// isOver tells the errors after which there is nothing left to watch with.
func isOver(err error) bool {
	return errors.Is(err, ErrLost) || errors.Is(err, block.ErrClosed) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// watcher is the state of one Watch. Only the goroutines that break run beside
// it, each on a slot that is busy meanwhile.
type watcher struct {
	s       *Session
	order   []int // slots to look at, nearest first
	watched map[int]*watched
	breaks  sync.WaitGroup
}

type watched struct {
	generation uint32
	lease      time.Duration // that it advertises
	window     Window
	busy       chan BreakReport // receives the end of a break that runs; nil when none does
	stuck      bool             // a break failed: it does not count as a neighbour
}

// scan finds the neighbours anew, keeping what is known of those that stay.
func (w *watcher) scan(ctx context.Context) error {
	s := w.s
	views, err := Observe(ctx, s.device, s.area)
	if err != nil {
		s.log.Warn("registers cannot be read", "err", err)
		return err
	}
	next := make(map[int]*watched)
	w.order = w.order[:0]
	counted := 0
	for i := 1; i < s.area.Slots && counted < watchedNeighbours; i++ {
		v := views[(s.slot+i)%s.area.Slots]
		if v.Register.Phase != Live && v.Register.Phase != Kill {
			continue
		}
		n := w.watched[v.Slot]
		if n == nil || n.generation != v.Register.Generation {
			n = &watched{generation: v.Register.Generation, lease: v.Register.Lease, window: Window{Period: s.opts.Period}}
		}
		next[v.Slot] = n
		w.order = append(w.order, v.Slot)
		if !n.stuck {
			counted++
		}
	}
	w.watched = next
	return nil
}

// look polls one neighbour and starts a break when its window is full.
func (w *watcher) look(ctx context.Context, slot int) error {
	s, n := w.s, w.watched[slot]
	if n.busy != nil {
		select {
		case report := <-n.busy:
			n.busy = nil
			n.stuck = report.Err != nil && !errors.Is(report.Err, ErrAlive)
			n.window = Window{Period: s.opts.Period}
		default:
			return nil
		}
	}
	gate := s.device.gate
	p := pollSlot(ctx, s.peer, s.device, slot, func() (bool, uint64) { return gate.open(), gate.lapses.Load() })
	if p.Err != nil && isOver(p.Err) {
		return p.Err
	}
	if n.window.Observe(p) {
		n.stuck = false
	}
	r := p.Register
	if p.Err != nil || r.Dead(n.generation) || r.Generation != n.generation || !s.suspect(ctx, slot, r, &n.window) {
		return nil
	}
	n.busy = make(chan BreakReport, 1)
	seen, again := n.window, n.stuck
	w.breaks.Go(func() {
		report := s.breakObserved(ctx, slot, n.generation, 0, seen)
		if !report.ByOther {
			s.tell(report, again)
		}
		n.busy <- report
	})
	return nil
}

// suspect reports whether a break is worth starting: it is silent for a full
// window, or missed a few heartbeats and is proven gone.
func (s *Session) suspect(ctx context.Context, slot int, r Register, w *Window) bool {
	if w.Full(r.Lease) {
		return true
	}
	if w.Silence() < 2*s.opts.Period {
		return false
	}
	gone, err := s.gone(ctx, slot, r)
	return err == nil && gone
}

// tell reports a break; again, when the one before it failed too, and was logged.
func (s *Session) tell(r BreakReport, again bool) {
	log := s.log.With("victim", r.Slot, "victim_generation", r.Generation, "host", r.HostName, "silence", r.Silence)
	switch {
	case r.Err == nil:
		log.Info("dead host was cut off", "proven", r.Proven, "fence_time", r.FenceTime)
	case again:
		log.Debug("silent host was not cut off", "err", r.Err)
	default:
		log.Warn("silent host was not cut off", "err", r.Err)
	}
	if s.opts.OnBreak != nil {
		s.opts.OnBreak(r)
	}
}
