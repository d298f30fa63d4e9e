package lease

import (
	"errors"
	"fmt"
	"time"

	"basalt/block"
	"basalt/block/unit"
	"basalt/internal/clock"
)

// Breaker breaks one generation of one slot (rule R9). It does no I/O.
//
//	watching ──window full, or proven gone──▶ killing ──KILL is ours──▶ rereading
//	   ▲  ▲                                      │                       │    │
//	   │  └──────────── changed by another ──────┘                       │    │
//	   │                                           heartbeat changed ◀───┘    │ unchanged
//	   │                                                  ▼                   ▼
//	   └──── somebody else's KILL ◀──────────────── withdrawing     fencing or draining
//	                                                      │                   │
//	        ended: ErrAlive, ErrUnfenced ◀────────────────┘                   ▼
//	        ended: broken ◀──────────────────────── DONE ◀──────────────── finishing
//
// Any KILL that is not followed at once by its own author's re-read is taken over
// only after a full window of one's own: a KILL that the window has not seen yet
// begins it anew. Whatever fails sends the machine back to watching; it gives up
// only when its driver does.
//
// Invariant: DONE is asked for only after this machine's own Fence succeeded, or
// after a person's word and the drain wait, with KILL in place before.
type Breaker struct {
	cfg      BreakerConfig
	state    breakerState
	window   Window
	kill     []byte // the image with our KILL
	seenKill clock.Instant
	killer   breaking
	fenced   bool          // the holder is cut off for good; the clock has no say any more
	lease    time.Duration // that the victim advertises
	outcome  error         // of withdrawing
	drained  clock.Instant
	report   BreakReport
	target   Register // as it was when KILL was asked for
}

// BreakerConfig says who breaks whom.
type BreakerConfig struct {
	Slot       int    // the victim's
	Generation uint32 // the victim's

	BySlot       uint8  // the breaker's
	ByGeneration uint32 // the breaker's; 0: it holds no slot

	Period time.Duration    // between polls
	Kinds  block.FenceKinds // methods of the breaker's fencer
	// Drain replaces the fence: a person vouches that the holder is down, and this
	// is how long its last writes may still take. 0: fence.
	Drain time.Duration
}

// BreakReport tells how a break went.
type BreakReport struct {
	Slot       int
	Generation uint32
	HostName   string
	Silence    time.Duration // observed before KILL
	Proven     bool          // proven gone, so that no window was needed
	FenceTime  time.Duration // fencing included; 0 when it did not come to DONE
	ByOther    bool          // it was dead before this break had come to an end
	Err        error         // nil: the generation is dead

	killedAt clock.Instant
}

type breakerState uint8

const (
	stateWatching breakerState = iota
	stateKilling
	stateRereading
	stateWithdrawing
	stateFencing
	stateDraining
	stateFinishing
	stateEnded
)

// BreakerEvent is what a Breaker is told.
type BreakerEvent struct {
	Kind BreakerEventKind
	Poll Poll // of Polled
	Gone bool // of Polled: the fencer has proof that the holder can no longer write
	// Image and Register are the register as Swapped left or found it; Image is nil
	// when that is unknown.
	Image    []byte
	Register Register
	Err      error // of Swapped: nil, unit.ErrConflict, unit.ErrNotExecuted or unknown outcome; of Fenced
}

// BreakerEventKind is the kind of a BreakerEvent.
type BreakerEventKind uint8

// The kinds of events.
const (
	BreakerTick BreakerEventKind = iota // start, or the time waited for has come
	Polled
	Swapped
	Fenced
)

// BreakerAction is the one thing a Breaker asks for next.
type BreakerAction struct {
	Kind   BreakerActionKind
	Until  clock.Instant // of WaitUntil
	Old    []byte        // of SwapRegister: the image to compare with
	Next   Register      // of SwapRegister
	Holder block.Holder  // of FenceHolder
	Err    error         // of EndBreak: nil when the generation is dead
	// Resolute actions follow a KILL: giving up here would leave it to others.
	Resolute bool
}

// BreakerActionKind is the kind of a BreakerAction.
type BreakerActionKind uint8

// The kinds of actions.
const (
	PollSlot     BreakerActionKind = iota // read register and heartbeat, ask whether gone; answer with Polled
	WaitUntil                             // answer with BreakerTick
	SwapRegister                          // answer with Swapped
	FenceHolder                           // answer with Fenced
	EndBreak                              // the machine has ended
)

// NewBreaker returns the machine. observed is what was seen of the victim before;
// the zero Window if nothing was.
func NewBreaker(cfg BreakerConfig, observed Window) *Breaker {
	observed.Period = cfg.Period
	return &Breaker{cfg: cfg, window: observed, report: BreakReport{Slot: cfg.Slot, Generation: cfg.Generation}}
}

// Report tells how the break went so far.
func (b *Breaker) Report() BreakReport { return b.report }

// Step tells the machine what happened and returns what to do.
func (b *Breaker) Step(now clock.Instant, ev BreakerEvent) BreakerAction {
	switch b.state {
	case stateWatching:
		if ev.Kind == BreakerTick {
			return BreakerAction{Kind: PollSlot}
		}
		return b.watch(now, ev)
	case stateKilling:
		return b.killed(now, ev)
	case stateRereading:
		return b.reread(now, ev)
	case stateWithdrawing:
		return b.withdrawn(now, ev)
	case stateFencing:
		return b.fence(now, ev.Err)
	case stateDraining:
		return b.drain(now, ev)
	case stateFinishing:
		return b.finished(now, ev)
	case stateEnded:
	}
	panic("lease: a breaker was stepped after its end")
}

func (b *Breaker) watch(now clock.Instant, ev BreakerEvent) BreakerAction {
	b.state = stateWatching
	p := ev.Poll
	alive := b.window.Observe(p)
	if p.Err != nil {
		if _, ok := errors.AsType[*block.CorruptError](p.Err); ok {
			return b.end(p.Err)
		}
		return b.again(now)
	}
	r := p.Register
	switch {
	case r.Dead(b.cfg.Generation):
		b.report.ByOther = true
		return b.end(nil)
	case r.Generation != b.cfg.Generation:
		return b.end(fmt.Errorf("lease: slot %d is at generation %d, not yet at %d", b.cfg.Slot, r.Generation, b.cfg.Generation))
	case alive && r.Phase == Live:
		b.report.HostName = r.HostName
		return b.end(b.holderError(ErrAlive, r, nil))
	case b.fenced && r.Phase == Kill:
		return b.finish(p.Image, r)
	}
	b.report.HostName, b.lease = r.HostName, r.Lease
	b.noteKill(now, r)
	proven := ev.Gone || b.fenced
	if !proven && !b.window.Full(r.Lease) {
		return b.again(now)
	}
	if r.Phase == Kill && !b.ours(r) && now.Sub(b.seenKill) < b.courtesy(r) {
		return b.again(now)
	}
	if b.cfg.Drain == 0 && r.Fencers&b.cfg.Kinds == 0 {
		return b.end(b.holderError(ErrUnfenced, r, nil))
	}
	b.report.Silence, b.report.Proven = b.window.Silence(), proven
	b.state, b.target = stateKilling, r
	r.Phase, r.BreakerSlot, r.BreakerGeneration = Kill, b.cfg.BySlot, b.cfg.ByGeneration
	return BreakerAction{Kind: SwapRegister, Old: p.Image, Next: r}
}

// noteKill remembers since when this breaker's KILL has been seen.
func (b *Breaker) noteKill(now clock.Instant, r Register) {
	k := breaking{phase: r.Phase, slot: r.BreakerSlot, generation: r.BreakerGeneration}
	if k != b.killer {
		b.killer, b.seenKill = k, now
	}
}

// courtesy is how long another's KILL is left to its author, who is probably at
// work. Two that wait out a drain must not take the KILL from each other for ever.
func (b *Breaker) courtesy(r Register) time.Duration {
	if b.cfg.Drain > 0 {
		return b.cfg.Drain + windowOf(r.Lease)
	}
	return 2 * b.cfg.Period
}

func (b *Breaker) again(now clock.Instant) BreakerAction {
	b.state = stateWatching
	return BreakerAction{Kind: WaitUntil, Until: b.window.next(now, b.lease)}
}

func (b *Breaker) killed(now clock.Instant, ev BreakerEvent) BreakerAction {
	if errors.Is(ev.Err, block.ErrBusy) {
		// Another process keeps the register's bytes locked, perhaps the holder itself,
		// stopped in the middle of its own change: only its end helps.
		return b.end(b.holderError(ErrUnfenced, b.target, ev.Err))
	}
	if ev.Err != nil {
		return b.refused()
	}
	b.report.killedAt = now
	b.kill = ev.Image
	b.state = stateRereading
	return BreakerAction{Kind: PollSlot, Resolute: true}
}

// refused follows a change that was not made, or whose outcome is unknown. In the
// latter case our KILL may be there, or still come, without a re-read after it: it
// is news to the window like another's.
func (b *Breaker) refused() BreakerAction {
	b.state = stateWatching
	return BreakerAction{Kind: PollSlot}
}

// ours reports whether the register still shows our KILL, perhaps with another
// count of calls.
func (b *Breaker) ours(r Register) bool {
	return r.Generation == b.cfg.Generation && r.Phase == Kill && b.cfg.ByGeneration != 0 &&
		r.BreakerSlot == b.cfg.BySlot && r.BreakerGeneration == b.cfg.ByGeneration
}

func (b *Breaker) reread(now clock.Instant, ev BreakerEvent) BreakerAction {
	p := ev.Poll
	if p.Err != nil {
		return b.again(now)
	}
	if string(p.Image) != string(b.kill) && !b.ours(p.Register) {
		return b.watch(now, ev)
	}
	b.kill = p.Image
	switch {
	case b.window.changed(p):
		// It lived between the last poll and KILL, and may have extended its lease
		// by that heartbeat.
		return b.withdraw(p.Image, p.Register, b.holderError(ErrAlive, p.Register, nil))
	case b.cfg.Drain > 0:
		b.state = stateDraining
		b.drained = now.Add(b.cfg.Drain)
		return BreakerAction{Kind: WaitUntil, Until: b.drained}
	}
	b.state = stateFencing
	r := p.Register
	return BreakerAction{Kind: FenceHolder, Holder: holderOf(b.cfg.Slot, r)}
}

func holderOf(slot int, r Register) block.Holder {
	return block.Holder{Slot: slot, Generation: r.Generation, HostID: r.HostID, Process: r.Process, Fencers: r.Fencers}
}

// withdraw takes our KILL back. Nobody but its author may: only the author knows
// that nothing was done on the strength of it.
func (b *Breaker) withdraw(img []byte, r Register, outcome error) BreakerAction {
	b.state = stateWithdrawing
	b.outcome = outcome
	r.Phase, r.BreakerSlot, r.BreakerGeneration = Live, 0, 0
	return BreakerAction{Kind: SwapRegister, Old: img, Next: r, Resolute: true}
}

func (b *Breaker) withdrawn(now clock.Instant, ev BreakerEvent) BreakerAction {
	switch {
	case ev.Kind == Polled && ev.Poll.Err == nil && b.ours(ev.Poll.Register):
		return b.withdraw(ev.Poll.Image, ev.Poll.Register, b.outcome)
	case ev.Kind == Polled:
		return b.watch(now, ev)
	case ev.Err == nil:
		return b.end(b.outcome)
	case errors.Is(ev.Err, unit.ErrConflict) || errors.Is(ev.Err, unit.ErrNotExecuted):
		return BreakerAction{Kind: PollSlot, Resolute: true}
	}
	return b.refused()
}

func (b *Breaker) fence(now clock.Instant, err error) BreakerAction {
	r, derr := DecodeRegister(b.kill)
	if derr != nil {
		panic("lease: the image of our own KILL does not decode: " + derr.Error())
	}
	switch {
	case err == nil:
		b.fenced = true
		return b.finish(b.kill, r)
	case errors.Is(err, block.ErrNotSupported):
		// Nothing was done to it. It may come back when its stall ends.
		return b.withdraw(b.kill, r, b.holderError(ErrUnfenced, r, err))
	}
	// Half done: KILL stays, so that it cannot come back.
	return b.end(b.holderError(ErrUnfenced, r, err))
}

// drain ends a person's drain wait with a last look: a holder that still beats is
// not down, whatever the person says.
func (b *Breaker) drain(now clock.Instant, ev BreakerEvent) BreakerAction {
	if ev.Kind == BreakerTick {
		if now < b.drained {
			return BreakerAction{Kind: WaitUntil, Until: b.drained}
		}
		return BreakerAction{Kind: PollSlot, Resolute: true}
	}
	p := ev.Poll
	switch {
	case p.Err != nil:
		return b.again(now)
	case string(p.Image) != string(b.kill) && !b.ours(p.Register):
		return b.watch(now, ev)
	case b.window.changed(p):
		return b.withdraw(p.Image, p.Register, b.holderError(ErrAlive, p.Register, nil))
	}
	return b.finish(p.Image, p.Register)
}

func (b *Breaker) finish(img []byte, r Register) BreakerAction {
	b.state = stateFinishing
	r.Phase, r.BreakerSlot, r.BreakerGeneration = Done, b.cfg.BySlot, b.cfg.ByGeneration
	return BreakerAction{Kind: SwapRegister, Old: img, Next: r, Resolute: true}
}

func (b *Breaker) finished(now clock.Instant, ev BreakerEvent) BreakerAction {
	if ev.Err != nil {
		return b.refused()
	}
	b.report.FenceTime = now.Sub(b.report.killedAt)
	return b.end(nil)
}

func (b *Breaker) end(err error) BreakerAction {
	b.state = stateEnded
	b.report.Err = err
	return BreakerAction{Kind: EndBreak, Err: err}
}

func (b *Breaker) holderError(kind error, r Register, cause error) error {
	return &HolderError{
		Err: kind, Slot: b.cfg.Slot, Generation: b.cfg.Generation, HostName: r.HostName, ClaimedAt: r.ClaimedAt,
		Silence: b.window.Silence(), Offers: r.Fencers, Cause: cause,
	}
}
