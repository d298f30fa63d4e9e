package lease_test

import (
	"testing"
	"time"

	"basalt/internal/clock"
	"basalt/lease"
)

// silentVictim is a holder that wrote its last heartbeat before the first poll.
func silentVictim() (lease.Register, lease.Heartbeat) {
	r := lease.Register{Generation: 3, Phase: lease.Live, Claim: 5, HostName: "victim", Lease: testLease}
	return r, lease.Heartbeat{Generation: 3, Sequence: 10, Nonce: 1}
}

func quickPoll(at time.Duration) lease.Poll {
	r, hb := silentVictim()
	return lease.Poll{Issued: clock.Instant(at), Done: clock.Instant(at + 10*time.Millisecond), Register: r, Heartbeat: hb, Leased: true}
}

func TestSilenceCountsFromTheFirstPollsEndToTheLastPollsIssue(t *testing.T) {
	w := lease.Window{Period: testPeriod}
	for at := time.Duration(0); at <= 8*time.Second; at += time.Second {
		w.Observe(quickPoll(at))
	}
	if got, want := w.Silence(), 8*time.Second-10*time.Millisecond; got != want {
		t.Fatalf("silence %v, want %v", got, want)
	}
	if w.Full(testLease) {
		t.Fatal("full after less than the lease")
	}
	w.Observe(quickPoll(8*time.Second + 89*time.Millisecond))
	if w.Full(testLease) {
		t.Fatal("full after less than the lease plus 1 %")
	}
	w.Observe(quickPoll(8*time.Second + 90*time.Millisecond))
	if !w.Full(testLease) {
		t.Fatalf("not full after %v", w.Silence())
	}
}

func TestWindowBeginsAnewWhenTheObserverIsNotHealthy(t *testing.T) {
	cases := map[string]func(p *lease.Poll){
		"poll failed":            func(p *lease.Poll) { p.Err = errTimeout },
		"poll slow":              func(p *lease.Poll) { p.Done = p.Issued.Add(testPeriod + 1) },
		"own lease not valid":    func(p *lease.Poll) { p.Leased = false },
		"own lease had lapsed":   func(p *lease.Poll) { p.Lapses = 1 },
		"another breaker's KILL": func(p *lease.Poll) { p.Register.Phase, p.Register.BreakerGeneration = lease.Kill, 9 },
		"sign of life":           func(p *lease.Poll) { p.Heartbeat.Sequence++ },
		"same sequence, nonce":   func(p *lease.Poll) { p.Heartbeat.Nonce++ },
	}
	for name, change := range cases {
		t.Run(name, func(t *testing.T) {
			w := lease.Window{Period: testPeriod}
			for at := time.Duration(0); at < 8*time.Second; at += time.Second {
				w.Observe(quickPoll(at))
			}
			p := quickPoll(8 * time.Second)
			change(&p)
			w.Observe(p)
			// The next poll is as the changed one, but for what ails it.
			q := quickPoll(9 * time.Second)
			q.Register, q.Heartbeat, q.Lapses = p.Register, p.Heartbeat, p.Lapses
			if p.Err != nil {
				q.Register, q.Heartbeat = quickPoll(0).Register, quickPoll(0).Heartbeat
			}
			w.Observe(q)
			if got := w.Silence(); got > time.Second {
				t.Fatalf("silence %v counts time before", got)
			}
		})
	}
}

func TestWindowBeginsAnewAfterAGapBetweenPolls(t *testing.T) {
	w := lease.Window{Period: testPeriod}
	w.Observe(quickPoll(0))
	w.Observe(quickPoll(9 * time.Second)) // the observer was frozen
	if w.Full(testLease) || w.Silence() != 0 {
		t.Fatalf("silence %v over a gap", w.Silence())
	}
}

func TestHeartbeatOfAnotherGenerationIsNoSignOfLife(t *testing.T) {
	w := lease.Window{Period: testPeriod}
	for at := time.Duration(0); at <= 9*time.Second; at += time.Second {
		p := quickPoll(at)
		if at == 4*time.Second {
			p.Heartbeat = lease.Heartbeat{Generation: 2, Sequence: 900, Nonce: 77} // landed late
		}
		if w.Observe(p) {
			t.Fatalf("alive at %v", at)
		}
	}
	if !w.Full(testLease) {
		t.Fatalf("silence only %v", w.Silence())
	}
}

func TestFirstHeartbeatOfAGenerationIsASignOfLife(t *testing.T) {
	w := lease.Window{Period: testPeriod}
	p := quickPoll(0)
	p.Heartbeat = lease.Heartbeat{Generation: 2}
	if w.Observe(p) {
		t.Fatal("alive at the first poll")
	}
	if !w.Observe(quickPoll(time.Second)) {
		t.Fatal("the claimer's first heartbeat went unnoticed")
	}
}
