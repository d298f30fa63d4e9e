package lease_test

import (
	"errors"
	"slices"
	"testing"
	"time"

	"basalt/block"
	"basalt/internal/clock"
	"basalt/lease"
)

const (
	testLease  = 8 * time.Second
	testPeriod = time.Second
)

// holding is a Holder with a clock, for scripts of events.
type holding struct {
	t   *testing.T
	h   *lease.Holder
	now clock.Instant
	own lease.Register
}

func newHolding(t *testing.T) *holding {
	own := lease.Register{Generation: 7, Phase: lease.Live, Claim: 99, HostName: "a", Lease: testLease}
	cfg := lease.HolderConfig{Generation: own.Generation, Claim: own.Claim, Lease: testLease, Period: testPeriod}
	return &holding{t: t, h: lease.NewHolder(cfg, 0), own: own}
}

// step returns the actions but for Wake.
func (s *holding) step(ev lease.HolderEvent) []lease.HolderAction {
	acts := s.h.Step(s.now, ev)
	return slices.DeleteFunc(acts, func(a lease.HolderAction) bool { return a.Kind == lease.Wake })
}

// want steps and checks the kinds of the actions.
func (s *holding) want(ev lease.HolderEvent, kinds ...lease.HolderActionKind) []lease.HolderAction {
	s.t.Helper()
	acts := s.step(ev)
	var got []lease.HolderActionKind
	for _, a := range acts {
		got = append(got, a.Kind)
	}
	if !slices.Equal(got, kinds) {
		s.t.Fatalf("at %v: event %+v gives actions %v, want %v", time.Duration(s.now), ev, got, kinds)
	}
	return acts
}

// pass lets time go by with a tick every half period, as a driver does.
func (s *holding) pass(d time.Duration) {
	s.t.Helper()
	for end := s.now.Add(d); s.now < end; {
		s.now = min(end, s.now.Add(testPeriod/2))
		s.step(tick)
	}
}

var (
	tick  = lease.HolderEvent{Kind: lease.HolderTick}
	wrote = lease.HolderEvent{Kind: lease.HolderWrote}
)

func (s *holding) clean() lease.HolderEvent {
	return lease.HolderEvent{Kind: lease.HolderRead, Register: s.own}
}

func (s *holding) reads(change func(r *lease.Register)) lease.HolderEvent {
	r := s.own
	change(&r)
	return lease.HolderEvent{Kind: lease.HolderRead, Register: r}
}

// hold takes a new machine to its first lease, at time 0.
func (s *holding) hold() {
	s.t.Helper()
	s.want(tick, lease.ReadOwn)
	s.want(s.clean(), lease.WriteHeartbeat)
	s.want(wrote, lease.ReadOwn)
	acts := s.want(s.clean(), lease.ExtendLease)
	if acts[0].Until != clock.Instant(testLease) {
		s.t.Fatalf("first lease until %v", acts[0].Until)
	}
}

func TestLeaseCountsFromBeforeTheHeartbeatsIssue(t *testing.T) {
	s := newHolding(t)
	s.hold()
	s.now = clock.Instant(time.Second)
	s.want(tick, lease.WriteHeartbeat)
	s.pass(1500 * time.Millisecond)
	s.want(wrote, lease.ReadOwn)
	s.pass(1500 * time.Millisecond)
	acts := s.want(s.clean(), lease.ExtendLease)
	if want := clock.Instant(time.Second + testLease); acts[0].Until != want {
		t.Fatalf("lease until %v, want %v: from the issue at 1s", time.Duration(acts[0].Until), time.Duration(want))
	}
}

func TestOnlyARegisterReadAfterTheHeartbeatExtends(t *testing.T) {
	s := newHolding(t)
	s.want(tick, lease.ReadOwn)
	s.want(s.clean(), lease.WriteHeartbeat) // clean, but read before the heartbeat
	s.want(wrote, lease.ReadOwn)
	s.want(lease.HolderEvent{Kind: lease.HolderRead, Err: errTimeout})
}

func TestFailedHeartbeatExtendsNothingAndIsRepeated(t *testing.T) {
	s := newHolding(t)
	s.hold()
	s.now = clock.Instant(time.Second)
	s.want(tick, lease.WriteHeartbeat)
	s.want(lease.HolderEvent{Kind: lease.HolderWrote, Err: errTimeout})
	s.now = s.now.Add(testPeriod / 4)
	acts := s.want(tick, lease.WriteHeartbeat)
	if acts[0].Sequence != 3 {
		t.Fatalf("sequence %d, want a new one", acts[0].Sequence)
	}
}

func TestHolderGivesUpOnAnyForeignRegister(t *testing.T) {
	cases := map[string]func(r *lease.Register){
		"kill":             func(r *lease.Register) { r.Phase, r.BreakerGeneration = lease.Kill, 3 },
		"done":             func(r *lease.Register) { r.Phase, r.BreakerGeneration = lease.Done, 3 },
		"free":             func(r *lease.Register) { r.Phase = lease.Free },
		"next generation":  func(r *lease.Register) { r.Generation++ },
		"older generation": func(r *lease.Register) { r.Generation-- },
		"another claim":    func(r *lease.Register) { r.Claim++ },
	}
	for name, change := range cases {
		t.Run(name, func(t *testing.T) {
			s := newHolding(t)
			s.hold()
			s.now = clock.Instant(time.Second)
			s.want(tick, lease.WriteHeartbeat)
			s.want(wrote, lease.ReadOwn)
			acts := s.want(s.reads(change), lease.LoseLease)
			if !errors.Is(acts[0].Err, lease.ErrLost) {
				t.Fatalf("error %v", acts[0].Err)
			}
			// A KILL that is withdrawn comes too late.
			for range 20 {
				s.now = s.now.Add(testPeriod)
				s.want(tick)
			}
		})
	}
}

func TestThawedHolderReadsBeforeItWrites(t *testing.T) {
	s := newHolding(t)
	s.hold()
	s.now = clock.Instant(2*testPeriod + 1) // frozen, but the lease is still valid
	s.want(tick, lease.ReadOwn)
	s.want(s.reads(func(r *lease.Register) { r.Phase, r.BreakerGeneration = lease.Kill, 1 }), lease.LoseLease)
}

func TestHolderFrozenAfterItsReadReadsAgain(t *testing.T) {
	s := newHolding(t)
	s.hold()
	s.now = clock.Instant(3 * testPeriod)
	s.want(tick, lease.ReadOwn)
	s.now = s.now.Add(2*testPeriod + 1)
	s.want(s.clean(), lease.ReadOwn)
	s.want(s.clean(), lease.WriteHeartbeat)
}

func TestExpiredHolderReadsFirstAndRegainsTheSameGeneration(t *testing.T) {
	s := newHolding(t)
	s.hold()
	s.now = clock.Instant(time.Second)
	s.want(tick, lease.WriteHeartbeat)
	s.pass(testLease - time.Second - 1)
	s.now = clock.Instant(testLease)
	s.want(tick, lease.LapseLease)
	s.pass(time.Second)
	// The heartbeat that was stuck ends; its lease would have been over at 9s.
	s.want(wrote, lease.ReadOwn)
	s.want(s.clean())
	s.want(tick, lease.ReadOwn)
	s.want(s.clean(), lease.WriteHeartbeat)
	s.want(wrote, lease.ReadOwn)
	acts := s.want(s.clean(), lease.ExtendLease)
	if want := s.now.Add(testLease); acts[0].Until != want {
		t.Fatalf("regained until %v, want %v", acts[0].Until, want)
	}
}

func TestStuckHeartbeatIsNotRepeated(t *testing.T) {
	s := newHolding(t)
	s.hold()
	s.now = clock.Instant(time.Second)
	s.want(tick, lease.WriteHeartbeat)
	for range 6 {
		s.now = s.now.Add(testPeriod)
		s.want(tick)
	}
}

func TestFencedHolderIsLostAtOnce(t *testing.T) {
	for _, ev := range []lease.HolderEvent{
		{Kind: lease.HolderFenced, Err: block.ErrFenced},
		{Kind: lease.HolderWrote, Err: block.ErrFenced},
	} {
		s := newHolding(t)
		s.hold()
		s.now = clock.Instant(time.Second)
		s.want(tick, lease.WriteHeartbeat)
		acts := s.want(ev, lease.LoseLease)
		if !errors.Is(acts[0].Err, lease.ErrLost) || !errors.Is(acts[0].Err, block.ErrFenced) {
			t.Fatalf("error %v", acts[0].Err)
		}
	}
}

func TestCallsAreToldOnce(t *testing.T) {
	s := newHolding(t)
	s.hold()
	s.own.Calls = 5
	s.now = clock.Instant(time.Second)
	s.want(tick, lease.WriteHeartbeat)
	s.want(wrote, lease.ReadOwn)
	s.want(s.clean(), lease.Called, lease.ExtendLease)
	s.now = clock.Instant(2 * time.Second)
	s.want(tick, lease.WriteHeartbeat)
	s.want(wrote, lease.ReadOwn)
	s.want(s.clean(), lease.ExtendLease)
}
