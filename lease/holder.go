package lease

import (
	"errors"
	"fmt"
	"time"

	"basalt/block"
	"basalt/internal/clock"
)

// Holder decides about one's own generation: when to write the heartbeat, when
// the lease extends, and when all is lost. It does no I/O.
//
//	                  ┌────────────── clean ◀───────────────┐
//	                  ▼                                     │
//	idle ──due──▶ writing ──written──▶ confirming ──clean──▶ idle, lease = begun + L
//	  │               ▲
//	  └─due, careful─▶ checking ──clean──┘         any read ──not clean──▶ lost (final)
//	                                               any failure ──▶ idle, retry soon
//
// A round that is not careful starts with the heartbeat. Careful, which it is at
// first, once the lease has ended, and after a gap of more than two periods
// between steps (the process was frozen), it starts with reading the register:
// after KILL a holder that thaws writes nothing more.
//
// Invariants: at most one I/O is outstanding. The lease never ends later than
// Lease after the instant before a heartbeat's issue (begun), and only a register
// read issued after that heartbeat completed has extended it (rule R7).
type Holder struct {
	cfg      HolderConfig
	stage    holderStage
	until    clock.Instant // the lease's end
	held     bool          // the lease was valid at the last step
	careful  bool          // the next round starts with the register
	begun    clock.Instant // before the issue of the round's heartbeat
	next     clock.Instant // the next round is due
	lastStep clock.Instant
	sequence uint64
	calls    uint32
}

// HolderConfig is the generation a Holder speaks for.
type HolderConfig struct {
	Generation uint32
	Claim      uint64 // Register.Claim
	Lease      time.Duration
	Period     time.Duration
}

type holderStage uint8

const (
	stageIdle holderStage = iota
	stageChecking
	stageWriting
	stageConfirming
	stageLost
)

// HolderEvent is what a Holder is told.
type HolderEvent struct {
	Kind     HolderEventKind
	Register Register // of HolderRead, when Err is nil
	Err      error    // of HolderRead, HolderWrote and HolderFenced
}

// HolderEventKind is the kind of a HolderEvent.
type HolderEventKind uint8

// The kinds of events.
const (
	HolderTick   HolderEventKind = iota // time has passed
	HolderWrote                         // the heartbeat was written, or Err
	HolderRead                          // the own register was read, or Err
	HolderFenced                        // the device has refused this host for good
)

// HolderAction is what a Holder asks for.
type HolderAction struct {
	Kind     HolderActionKind
	Sequence uint64        // of WriteHeartbeat
	NotAfter clock.Instant // of WriteHeartbeat: do not submit later, answer ErrStale instead
	Until    clock.Instant // of ExtendLease: the lease's end; of Wake: when to tick
	Err      error         // of LoseLease: wraps ErrLost
}

// HolderActionKind is the kind of a HolderAction.
type HolderActionKind uint8

// The kinds of actions.
const (
	WriteHeartbeat HolderActionKind = iota // answer with HolderWrote
	ReadOwn                                // read the own register; answer with HolderRead
	ExtendLease                            // the lease is valid until Until
	LapseLease                             // the lease has ended; it may come back
	LoseLease                              // the generation is gone for good
	Called                                 // the register's calls counter has changed
	Wake                                   // tick at Until, or earlier
)

// ErrStale answers a WriteHeartbeat that came too late to be submitted.
var ErrStale = errors.New("lease: heartbeat is too old to be written")

// NewHolder returns the machine of a generation that has just been claimed. Its
// lease begins with the first round.
func NewHolder(cfg HolderConfig, now clock.Instant) *Holder {
	return &Holder{cfg: cfg, careful: true, next: now, lastStep: now, until: now}
}

// Step tells the machine what happened and returns what to do, in order. The last
// action is Wake unless the lease is lost; a new Step replaces it.
func (h *Holder) Step(now clock.Instant, ev HolderEvent) []HolderAction {
	if h.stage == stageLost {
		return nil
	}
	var acts []HolderAction
	gap := now.Sub(h.lastStep) > 2*h.cfg.Period
	h.lastStep = now
	if h.held && now >= h.until {
		h.held = false
		acts = append(acts, HolderAction{Kind: LapseLease})
	}
	if gap || !h.held {
		h.careful = true
	}
	switch ev.Kind {
	case HolderTick:
		if h.stage == stageIdle && now >= h.next {
			acts = h.begin(now, acts)
		}
	case HolderWrote:
		acts = h.wrote(now, ev.Err, acts)
	case HolderRead:
		acts = h.read(now, ev, gap, acts)
	case HolderFenced:
		acts = h.lose(ev.Err, acts)
	}
	if h.stage == stageLost {
		return acts
	}
	return append(acts, HolderAction{Kind: Wake, Until: h.wake(now)})
}

func (h *Holder) begin(now clock.Instant, acts []HolderAction) []HolderAction {
	if h.careful {
		h.stage = stageChecking
		return append(acts, HolderAction{Kind: ReadOwn})
	}
	return h.write(now, acts)
}

func (h *Holder) write(now clock.Instant, acts []HolderAction) []HolderAction {
	h.stage = stageWriting
	h.begun = now
	h.sequence++
	return append(acts, HolderAction{Kind: WriteHeartbeat, Sequence: h.sequence, NotAfter: now.Add(2 * h.cfg.Period)})
}

func (h *Holder) wrote(now clock.Instant, err error, acts []HolderAction) []HolderAction {
	if h.stage != stageWriting {
		panic("lease: a heartbeat was written that the holder did not ask for")
	}
	switch {
	case errors.Is(err, block.ErrFenced):
		return h.lose(err, acts)
	case err != nil:
		// The heartbeat may have landed or may still land. It extends nothing.
		h.retry(now)
		return acts
	}
	h.stage = stageConfirming
	return append(acts, HolderAction{Kind: ReadOwn})
}

func (h *Holder) read(now clock.Instant, ev HolderEvent, gap bool, acts []HolderAction) []HolderAction {
	if h.stage != stageChecking && h.stage != stageConfirming {
		panic("lease: a register was read that the holder did not ask for")
	}
	switch {
	case errors.Is(ev.Err, block.ErrFenced):
		return h.lose(ev.Err, acts)
	case ev.Err != nil:
		h.retry(now)
		return acts
	}
	if err := h.judge(ev.Register); err != nil {
		return h.lose(err, acts)
	}
	if ev.Register.Calls != h.calls {
		h.calls = ev.Register.Calls
		acts = append(acts, HolderAction{Kind: Called})
	}
	if h.stage == stageChecking {
		if gap {
			// Frozen since the read: what it said is old.
			return append(acts, HolderAction{Kind: ReadOwn})
		}
		return h.write(now, acts)
	}
	return h.confirm(now, acts)
}

// confirm ends a round whose heartbeat completed before a clean register read was
// issued.
func (h *Holder) confirm(now clock.Instant, acts []HolderAction) []HolderAction {
	h.stage = stageIdle
	h.next = max(now, h.begun.Add(h.cfg.Period))
	end := h.begun.Add(h.cfg.Lease)
	if end <= now {
		return acts
	}
	h.until = end
	h.held = true
	h.careful = false
	return append(acts, HolderAction{Kind: ExtendLease, Until: end})
}

// judge returns nil when the register is clean: LIVE, and of this very claim.
func (h *Holder) judge(r Register) error {
	if r.Generation == h.cfg.Generation && r.Claim == h.cfg.Claim && r.Phase == Live {
		return nil
	}
	if r.Generation == h.cfg.Generation && r.Phase == Kill {
		return fmt.Errorf("generation %d is being broken by slot %d", r.Generation, r.BreakerSlot)
	}
	return fmt.Errorf("register shows generation %d %v of host %q", r.Generation, r.Phase, r.HostName)
}

func (h *Holder) lose(cause error, acts []HolderAction) []HolderAction {
	h.stage = stageLost
	h.held = false
	return append(acts, HolderAction{Kind: LoseLease, Err: fmt.Errorf("%w: %w", ErrLost, cause)})
}

func (h *Holder) retry(now clock.Instant) {
	h.stage = stageIdle
	h.next = now.Add(h.cfg.Period / 4)
}

// wake is never later than a period away, so that a frozen process is told from a
// slow device.
func (h *Holder) wake(now clock.Instant) clock.Instant {
	at := now.Add(h.cfg.Period)
	if h.stage == stageIdle {
		at = min(at, h.next)
	}
	if h.held {
		at = min(at, h.until)
	}
	return at
}
