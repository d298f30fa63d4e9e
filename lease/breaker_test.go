package lease_test

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"
	"time"

	"basalt/block"
	"basalt/block/unit"
	"basalt/internal/clock"
	"basalt/lease"
)

// breakTable is a register, a heartbeat and a fencer under a Breaker's hands.
type breakTable struct {
	t        *testing.T
	now      clock.Instant
	image    []byte
	beat     lease.Heartbeat
	gone     bool
	fenceErr error
	fences   int
	history  []string // phases written, in order
	// before runs ahead of each action that is performed on the table, with the
	// number of such actions of its kind so far, from 1.
	before func(kind lease.BreakerActionKind, n int)
	// fail, if set, replaces the answer of an action.
	fail func(a lease.BreakerAction, n int) *lease.BreakerEvent
}

func newBreakTable(t *testing.T) *breakTable {
	r, hb := silentVictim()
	r.Fencers = block.FencePR | block.FenceOFD
	b := &breakTable{t: t, beat: hb, image: make([]byte, lease.RegisterBytes)}
	b.set(func(x *lease.Register) { *x = r })
	return b
}

func (b *breakTable) register() lease.Register {
	r, err := lease.DecodeRegister(b.image)
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

// set changes the register as another host would.
func (b *breakTable) set(change func(r *lease.Register)) {
	img := make([]byte, len(b.image))
	copy(img, b.image)
	var r lease.Register
	if binary.LittleEndian.Uint64(img[8:]) != 0 {
		r = b.register()
	}
	change(&r)
	r.EncodeInto(img)
	binary.LittleEndian.PutUint64(img[8:], binary.LittleEndian.Uint64(img[8:])+1)
	b.image = img
}

func breakerConfig() lease.BreakerConfig {
	return lease.BreakerConfig{Slot: 4, Generation: 3, BySlot: 1, ByGeneration: 11, Period: testPeriod, Kinds: block.FencePR}
}

// run drives the machine until it ends or has made limit steps.
func (b *breakTable) run(m *lease.Breaker, limit int) (error, bool) {
	b.t.Helper()
	ev := lease.BreakerEvent{Kind: lease.BreakerTick}
	count := make(map[lease.BreakerActionKind]int)
	for range limit {
		a := m.Step(b.now, ev)
		if a.Kind == lease.EndBreak {
			return a.Err, true
		}
		count[a.Kind]++
		if b.before != nil {
			b.before(a.Kind, count[a.Kind])
		}
		ev = b.perform(a)
		if b.fail != nil {
			if other := b.fail(a, count[a.Kind]); other != nil {
				ev = *other
			}
		}
	}
	return nil, false
}

func (b *breakTable) perform(a lease.BreakerAction) lease.BreakerEvent {
	switch a.Kind {
	case lease.PollSlot:
		p := lease.Poll{Issued: b.now, Image: b.image, Register: b.register(), Heartbeat: b.beat, Leased: true}
		b.now = b.now.Add(time.Millisecond)
		p.Done = b.now
		return lease.BreakerEvent{Kind: lease.Polled, Poll: p, Gone: b.gone}
	case lease.WaitUntil:
		b.now = max(b.now, a.Until)
		return lease.BreakerEvent{Kind: lease.BreakerTick}
	case lease.SwapRegister:
		b.now = b.now.Add(time.Millisecond)
		if string(a.Old) != string(b.image) {
			return lease.BreakerEvent{Kind: lease.Swapped, Image: b.image, Register: b.register(), Err: unit.ErrConflict}
		}
		b.set(func(r *lease.Register) { *r = a.Next })
		b.history = append(b.history, a.Next.Phase.String())
		return lease.BreakerEvent{Kind: lease.Swapped, Image: b.image, Register: b.register()}
	case lease.FenceHolder:
		b.fences++
		return lease.BreakerEvent{Kind: lease.Fenced, Err: b.fenceErr}
	case lease.EndBreak:
	}
	b.t.Fatalf("action %v", a.Kind)
	return lease.BreakerEvent{}
}

func (b *breakTable) wantHistory(want string) {
	b.t.Helper()
	if got := strings.Join(b.history, " "); got != want {
		b.t.Fatalf("phases written: %q, want %q", got, want)
	}
}

// finish runs the machine to its end.
func (b *breakTable) finish(m *lease.Breaker) error {
	b.t.Helper()
	err, ended := b.run(m, 200)
	if !ended {
		b.t.Fatal("the breaker does not end")
	}
	return err
}

func TestBreakerWaitsTheFullWindowThenKillsFencesAndFinishes(t *testing.T) {
	b := newBreakTable(t)
	var killedAt clock.Instant
	b.before = func(kind lease.BreakerActionKind, n int) {
		if kind == lease.SwapRegister && n == 1 {
			killedAt = b.now
		}
	}
	m := lease.NewBreaker(breakerConfig(), lease.Window{})
	if err := b.finish(m); err != nil {
		t.Fatal(err)
	}
	b.wantHistory("KILL DONE")
	if b.fences != 1 || killedAt < clock.Instant(testLease+testLease/100) {
		t.Fatalf("%d fences, KILL after %v", b.fences, time.Duration(killedAt))
	}
	r := b.register()
	if r.BreakerSlot != 1 || r.BreakerGeneration != 11 || !r.Dead(3) || r.HostName != "victim" {
		t.Fatalf("register %+v", r)
	}
	if rep := m.Report(); rep.Silence < testLease || rep.FenceTime <= 0 || rep.Proven {
		t.Fatalf("report %+v", rep)
	}
}

func TestProofReplacesTheWindowAndNothingElse(t *testing.T) {
	b := newBreakTable(t)
	b.gone = true
	if err := b.finish(lease.NewBreaker(breakerConfig(), lease.Window{})); err != nil {
		t.Fatal(err)
	}
	b.wantHistory("KILL DONE")
	if b.fences != 1 || b.now > clock.Instant(time.Second) {
		t.Fatalf("%d fences after %v", b.fences, time.Duration(b.now))
	}
}

func TestHeartbeatEndsTheBreak(t *testing.T) {
	b := newBreakTable(t)
	b.before = func(kind lease.BreakerActionKind, n int) {
		if kind == lease.PollSlot && n == 5 {
			b.beat.Sequence++
		}
	}
	err := b.finish(lease.NewBreaker(breakerConfig(), lease.Window{}))
	if !errors.Is(err, lease.ErrAlive) {
		t.Fatal(err)
	}
	b.wantHistory("")
}

func TestHeartbeatBetweenLastPollAndKillWithdrawsIt(t *testing.T) {
	b := newBreakTable(t)
	b.before = func(kind lease.BreakerActionKind, n int) {
		if kind == lease.SwapRegister && n == 1 {
			b.beat.Sequence++
		}
	}
	err := b.finish(lease.NewBreaker(breakerConfig(), lease.Window{}))
	if !errors.Is(err, lease.ErrAlive) {
		t.Fatal(err)
	}
	b.wantHistory("KILL LIVE")
	if r := b.register(); b.fences != 0 || r.BreakerGeneration != 0 || r.Generation != 3 {
		t.Fatalf("%d fences, register %+v", b.fences, r)
	}
}

func TestOnlyTheAuthorWithdraws(t *testing.T) {
	b := newBreakTable(t)
	b.before = func(kind lease.BreakerActionKind, n int) {
		switch {
		case kind == lease.SwapRegister && n == 1:
			b.beat.Sequence++ // so the re-read would withdraw
		case kind == lease.PollSlot && b.register().Phase == lease.Kill && b.register().BreakerSlot == 1:
			b.set(func(r *lease.Register) { r.BreakerSlot, r.BreakerGeneration = 2, 5 }) // taken over first
		}
	}
	_, ended := b.run(lease.NewBreaker(breakerConfig(), lease.Window{}), 30)
	if ended {
		t.Fatal("the break ended while another's KILL stands")
	}
	b.wantHistory("KILL")
}

func TestAnothersKillIsFinishedOnlyAfterAFullWindowOfOnesOwn(t *testing.T) {
	b := newBreakTable(t)
	var seen clock.Instant
	b.before = func(kind lease.BreakerActionKind, n int) {
		if kind == lease.PollSlot && n == 8 { // just before our own window is full
			b.set(func(r *lease.Register) { r.Phase, r.BreakerSlot, r.BreakerGeneration = lease.Kill, 2, 5 })
			seen = b.now
		}
	}
	if err := b.finish(lease.NewBreaker(breakerConfig(), lease.Window{})); err != nil {
		t.Fatal(err)
	}
	b.wantHistory("KILL DONE")
	if waited := b.now.Sub(seen); waited < testLease+testLease/100 {
		t.Fatalf("took the KILL over after %v", waited)
	}
	if r := b.register(); r.BreakerSlot != 1 || b.fences != 1 {
		t.Fatalf("register %+v, %d fences", r, b.fences)
	}
}

func TestKillWithUnknownOutcomeNeedsANewWindow(t *testing.T) {
	b := newBreakTable(t)
	var first clock.Instant
	b.fail = func(a lease.BreakerAction, n int) *lease.BreakerEvent {
		if a.Kind == lease.SwapRegister && n == 1 {
			first = b.now
			return &lease.BreakerEvent{Kind: lease.Swapped, Err: errTimeout} // it took effect
		}
		return nil
	}
	if err := b.finish(lease.NewBreaker(breakerConfig(), lease.Window{})); err != nil {
		t.Fatal(err)
	}
	b.wantHistory("KILL KILL DONE")
	if waited := b.now.Sub(first); waited < testLease {
		t.Fatalf("second KILL %v after the first", waited)
	}
}

// A register whose bytes another process keeps locked cannot be changed: the break
// ends and says so, instead of trying for ever.
func TestRegisterThatStaysBusyEndsTheBreak(t *testing.T) {
	b := newBreakTable(t)
	b.fail = func(a lease.BreakerAction, _ int) *lease.BreakerEvent {
		if a.Kind == lease.SwapRegister {
			return &lease.BreakerEvent{Kind: lease.Swapped, Err: block.ErrBusy}
		}
		return nil
	}
	err := b.finish(lease.NewBreaker(breakerConfig(), lease.Window{}))
	if !errors.Is(err, lease.ErrUnfenced) || !errors.Is(err, block.ErrBusy) {
		t.Fatalf("break of a holder whose register is busy: %v", err)
	}
}

func TestCallsDoNotStopABreak(t *testing.T) {
	for n := 1; n <= 2; n++ { // a call just before KILL, and just before DONE
		b := newBreakTable(t)
		b.before = func(kind lease.BreakerActionKind, i int) {
			if kind == lease.SwapRegister && i == n {
				b.set(func(r *lease.Register) { r.Calls++ })
			}
		}
		if err := b.finish(lease.NewBreaker(breakerConfig(), lease.Window{})); err != nil {
			t.Fatal(err)
		}
		b.wantHistory("KILL DONE")
		if b.fences != 1 {
			t.Fatalf("%d fences", b.fences)
		}
	}
}

func TestDeadGenerationNeedsNoBreak(t *testing.T) {
	for name, change := range map[string]func(r *lease.Register){
		"done":            func(r *lease.Register) { r.Phase = lease.Done },
		"free":            func(r *lease.Register) { r.Phase = lease.Free },
		"next generation": func(r *lease.Register) { r.Generation++ },
	} {
		b := newBreakTable(t)
		b.set(change)
		if err := b.finish(lease.NewBreaker(breakerConfig(), lease.Window{})); err != nil || len(b.history) > 0 {
			t.Fatalf("%s: %v, wrote %v", name, err, b.history)
		}
	}
}

func TestWithoutACommonMethodNobodyIsKilled(t *testing.T) {
	b := newBreakTable(t)
	cfg := breakerConfig()
	cfg.Kinds = block.FenceAgent
	err := b.finish(lease.NewBreaker(cfg, lease.Window{}))
	if !errors.Is(err, lease.ErrUnfenced) || !strings.Contains(err.Error(), `"victim"`) {
		t.Fatal(err)
	}
	b.wantHistory("")
	if he, ok := errors.AsType[*lease.HolderError](err); !ok || he.Silence < testLease {
		t.Fatalf("silence in %v", err)
	}
}

func TestRefusedFenceWithdrawsAndHalfDoneFenceStays(t *testing.T) {
	for _, c := range []struct {
		err  error
		want string
	}{
		{block.ErrNotSupported, "KILL LIVE"},
		{block.ErrBusy, "KILL"},
	} {
		b := newBreakTable(t)
		b.fenceErr = c.err
		err := b.finish(lease.NewBreaker(breakerConfig(), lease.Window{}))
		if !errors.Is(err, lease.ErrUnfenced) || !errors.Is(err, c.err) {
			t.Fatal(err)
		}
		b.wantHistory(c.want)
	}
}

func TestPersonReplacesOnlyTheFence(t *testing.T) {
	b := newBreakTable(t)
	cfg := breakerConfig()
	cfg.Kinds, cfg.Drain = 0, 10*time.Second
	var killedAt clock.Instant
	b.before = func(kind lease.BreakerActionKind, n int) {
		if kind == lease.SwapRegister && n == 1 {
			killedAt = b.now
		}
	}
	if err := b.finish(lease.NewBreaker(cfg, lease.Window{})); err != nil {
		t.Fatal(err)
	}
	b.wantHistory("KILL DONE")
	if killedAt < clock.Instant(testLease+testLease/100) || b.now.Sub(killedAt) < cfg.Drain || b.fences != 0 {
		t.Fatalf("KILL after %v, DONE %v later, %d fences", time.Duration(killedAt), b.now.Sub(killedAt), b.fences)
	}
}

func TestPersonIsNotBelievedAgainstAHeartbeat(t *testing.T) {
	b := newBreakTable(t)
	cfg := breakerConfig()
	cfg.Drain = 10 * time.Second
	killed := false
	b.before = func(kind lease.BreakerActionKind, _ int) {
		if kind == lease.SwapRegister {
			killed = true
		}
		if kind == lease.WaitUntil && killed {
			b.beat.Sequence++ // during the drain wait
		}
	}
	err := b.finish(lease.NewBreaker(cfg, lease.Window{}))
	if !errors.Is(err, lease.ErrAlive) {
		t.Fatal(err)
	}
	b.wantHistory("KILL LIVE")
}

func TestBreakStartsWithTheSilenceSeenBefore(t *testing.T) {
	b := newBreakTable(t)
	w := lease.Window{Period: testPeriod}
	for range 12 {
		w.Observe(lease.Poll{Issued: b.now, Done: b.now, Register: b.register(), Heartbeat: b.beat, Leased: true})
		b.now = b.now.Add(testPeriod)
	}
	start := b.now
	if err := b.finish(lease.NewBreaker(breakerConfig(), w)); err != nil {
		t.Fatal(err)
	}
	if b.now.Sub(start) > testPeriod {
		t.Fatalf("observed anew for %v", b.now.Sub(start))
	}
}
