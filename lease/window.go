package lease

import (
	"time"

	"basalt/internal/clock"
)

// Poll is one look at a slot: its register, then its heartbeat.
type Poll struct {
	Issued, Done clock.Instant // before the first read, after the last
	Err          error         // of the reads; the fields below are then unset
	Image        []byte        // the register's whole unit
	Register     Register
	Heartbeat    Heartbeat // zero when it is damaged: that is no sign of life
	Leased       bool      // the observer's own lease was valid throughout
	Lapses       uint64    // how often the observer's own lease has lapsed so far
}

// beat is the part of a heartbeat that changes with every sign of life.
type beat struct {
	sequence, nonce uint64
}

// Window measures how long a holder has been silent. Only time in which the
// observer's own I/O was healthy counts: a poll that failed or took longer than a
// period, a gap of more than two periods between polls (the observer was frozen),
// and a lapse of the observer's own lease all begin it anew. So does a change of
// the register's generation, or of who is breaking it.
//
// The zero Window is ready to use with a Period.
type Window struct {
	Period time.Duration // the observer's own

	running  bool
	from     clock.Instant // the last sign of life, or the start, had been read by then
	issued   clock.Instant // of the last poll
	done     clock.Instant // of the last poll
	lapses   uint64
	known    bool // a poll of this claim has succeeded
	claim    uint64
	breaking breaking
	beats    bool // last holds a heartbeat of the register's generation
	last     beat
}

// breaking tells one breaker's KILL from another's.
type breaking struct {
	phase      Phase
	slot       uint8
	generation uint32
}

// Observe takes a poll into account and reports whether it shows a sign of life
// since the poll before it.
func (w *Window) Observe(p Poll) (alive bool) {
	if p.Err != nil {
		w.running = false
		return false
	}
	r := p.Register
	now := breaking{phase: r.Phase, slot: r.BreakerSlot, generation: r.BreakerGeneration}
	seen := w.known && w.claim == r.Claim
	if !seen {
		w.known, w.claim, w.beats = true, r.Claim, false
	}
	if !seen || w.breaking != now {
		w.running = false
	}
	w.breaking = now
	// A heartbeat of another generation is somebody's late write.
	if p.Heartbeat.Generation == r.Generation {
		alive = seen && w.changed(p)
		if alive {
			w.running = false
		}
		w.beats, w.last = true, beat{p.Heartbeat.Sequence, p.Heartbeat.Nonce}
	}
	slow := p.Done.Sub(p.Issued) > w.Period
	gap := w.running && p.Issued.Sub(w.done) > 2*w.Period
	if slow || gap || !p.Leased || p.Lapses != w.lapses {
		w.running = false
	}
	w.lapses = p.Lapses
	if !w.running {
		w.from = p.Done
		w.running = p.Leased
	}
	w.issued, w.done = p.Issued, p.Done
	return alive
}

// Silence is how long the holder is known to have been silent.
func (w *Window) Silence() time.Duration {
	if !w.running || w.issued < w.from {
		return 0
	}
	return w.issued.Sub(w.from)
}

// Full reports whether the silence is long enough to break a holder that
// advertises the given lease: its clock may run 1 % slower than ours.
func (w *Window) Full(lease time.Duration) bool {
	return w.running && w.Silence() >= windowOf(lease)
}

// next is when the next poll is due: after a period, or as soon as it would find
// the window full.
func (w *Window) next(now clock.Instant, lease time.Duration) clock.Instant {
	at := now.Add(w.Period)
	if full := w.from.Add(windowOf(lease)); w.running && full > now {
		return min(at, full)
	}
	return at
}

func windowOf(lease time.Duration) time.Duration { return lease + (lease+99)/100 }

// changed reports whether the poll's heartbeat differs from the last one that was
// observed.
func (w *Window) changed(p Poll) bool {
	return p.Heartbeat.Generation == p.Register.Generation && (!w.beats || beat{p.Heartbeat.Sequence, p.Heartbeat.Nonce} != w.last)
}
