package lease_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"basalt/block"
	"basalt/lease"
)

func TestLiveHostIsNotBroken(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a, b := x.machine("a"), x.machine("b")
		a.claim()
		b.claim()
		err := a.breakHost(b)
		he, ok := errors.AsType[*lease.HolderError](err)
		if !ok || !errors.Is(err, lease.ErrAlive) || he.HostName != "b" || he.Slot != 1 {
			t.Fatal(err)
		}
		if r := x.register(1); r.Phase != lease.Live {
			t.Fatalf("register %+v", r)
		}
		if err := a.breakHost(a); !errors.Is(err, lease.ErrAlive) {
			t.Fatalf("broke itself: %v", err)
		}
	})
}

func TestSilentHostThatCannotBeFencedStaysUntilAPersonConfirms(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a, b := x.machine("a"), x.machine("b")
		a.fencer = paperFencer{} // offers an agent; b offers reservations
		a.claim(func(o *lease.Options) { o.Drain = 5 * time.Second })
		b.claim()
		x.tick(time.Second)
		b.freeze()
		err := a.breakHost(b)
		if he, ok := errors.AsType[*lease.HolderError](err); !ok || !errors.Is(err, lease.ErrUnfenced) || he.Silence < testLease || he.Offers != block.FencePR {
			t.Fatal(err)
		}
		if r := x.register(1); r.Phase != lease.Live {
			t.Fatalf("register %+v", r)
		}
		start := a.clk.Now()
		if err := x.during(func(ctx context.Context) error { return a.s.ConfirmDown(ctx, 1, 1) }); err != nil {
			t.Fatal(err)
		}
		if took := a.clk.Now().Sub(start); took < testLease+5*time.Second {
			t.Fatalf("confirmed within %v", took)
		}
		b.thaw()
		x.tick(time.Second)
		if r := x.register(1); r.Phase != lease.Done || !b.isLost() {
			t.Fatalf("register %+v, b lost %v", r, b.isLost())
		}
	})
}

// A breaker that dies after its n-th change is replaced by another, whatever it
// left, and the victim stays out.
func TestBreakerThatDiesAtAnyStepIsReplaced(t *testing.T) {
	for died := 1; died <= 2; died++ {
		for _, executed := range []bool{false, true} {
			t.Run(fmt.Sprintf("change %d executed %v", died, executed), func(t *testing.T) {
				inSite(t, 3, func(t *testing.T, x *site) { breakerDies(t, x, died, executed) })
			})
		}
	}
}

func breakerDies(t *testing.T, x *site, died int, executed bool) {
	a, b, v := x.machine("a"), x.machine("b"), x.machine("v")
	for _, m := range x.machines {
		m.claim()
	}
	x.tick(2 * time.Second)
	v.freeze()
	die := func() {
		a.nexus.Kill()
	}
	hook := func(w *wire) {
		if executed {
			w.afterCAW = die
		} else {
			w.beforeCAW = die
		}
	}
	if died == 2 {
		second := hook
		hook = func(w *wire) {
			w.afterCAW = func() { a.dev.set(second) }
		}
	}
	a.dev.set(hook)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	dead := x.start(func() error { return a.s.Break(ctx, v.s.Slot(), v.s.Generation()) })
	x.tick(testLease + 2*time.Second)
	left := x.register(2).Phase
	start := b.clk.Now()
	if err := b.breakHost(v); err != nil {
		t.Fatal(err)
	}
	took := b.clk.Now().Sub(start)
	if left == lease.Kill && took < testLease+testLease/100 {
		t.Fatalf("finished another's KILL after %v", took)
	}
	if r := x.register(2); r.Phase != lease.Done || r.Generation != 1 {
		t.Fatalf("register %+v", r)
	}
	v.thaw()
	x.tick(2 * time.Second)
	if !v.isLost() {
		t.Fatal("the victim lives")
	}
	cancel()
	x.tick(3 * testLease)
	<-dead
}

func TestTwoBreakersAtOnceBothSeeItDead(t *testing.T) {
	inSite(t, 3, func(t *testing.T, x *site) {
		a, b, v := x.machine("a"), x.machine("b"), x.machine("v")
		for _, m := range x.machines {
			m.claim()
		}
		v.freeze()
		one := x.start(func() error { return a.s.Break(context.Background(), v.s.Slot(), 1) })
		two := x.start(func() error { return b.s.Break(context.Background(), v.s.Slot(), 1) })
		x.tick(3 * testLease)
		if err := errors.Join(<-one, <-two); err != nil {
			t.Fatal(err)
		}
		if r := x.register(2); r.Phase != lease.Done || a.isLost() || b.isLost() {
			t.Fatalf("register %+v", r)
		}
	})
}

func TestTwoBreaksOfOneSessionTakeTurns(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a, v := x.machine("a"), x.machine("v")
		a.claim()
		v.claim()
		v.freeze()
		var ends []<-chan error
		for range 4 {
			ends = append(ends, x.start(func() error { return a.s.Break(context.Background(), 1, 1) }))
		}
		before := a.nexus.Stats().CAWs
		x.tick(2 * testLease)
		for _, e := range ends {
			if err := <-e; err != nil {
				t.Fatal(err)
			}
		}
		if got := a.nexus.Stats().CAWs - before; got != 2 {
			t.Fatalf("%d changes of the register, want KILL and DONE", got)
		}
	})
}

// The holder of slot 0 is broken and its slot claimed anew while a heartbeat of
// its is still on its way (design, scenario 5).
func TestLateHeartbeatOfTheLastOwnerIsNoSignOfLife(t *testing.T) {
	inSite(t, 3, func(t *testing.T, x *site) {
		old, b := x.machine("old"), x.machine("b")
		old.fencer, b.fencer = paperFencer{}, paperFencer{} // nothing aborts the late write
		old.claim()
		b.claim()
		hold := old.nexus.HoldWrites()
		x.tick(1500 * time.Millisecond)
		old.freeze()
		if hold.Pending() != 1 {
			t.Fatalf("%d heartbeats on their way", hold.Pending())
		}
		if err := b.breakHost(old); err != nil {
			t.Fatal(err)
		}
		c := x.machine("c")
		c.fencer = paperFencer{}
		c.claim()
		if c.s.Slot() != 0 || c.s.Generation() != 2 {
			t.Fatalf("slot %d generation %d", c.s.Slot(), c.s.Generation())
		}
		c.freeze()
		done := x.start(func() error { return b.s.Break(context.Background(), 0, 2) })
		x.tick(4 * time.Second)
		hold.Release()
		x.tick(testLease - 2*time.Second)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
}

func TestFencedHostIsLostAtItsNextWrite(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a, b := x.machine("a"), x.machine("b")
		a.claim()
		b.claim()
		if err := a.nexus.Fence(t.Context(), block.Holder{Slot: 1, Generation: 1, Fencers: block.FencePR}); err != nil {
			t.Fatal(err)
		}
		err := x.during(func(ctx context.Context) error {
			return b.s.Device().WriteAt(ctx, block512('f'), dataOff)
		})
		if !errors.Is(err, block.ErrFenced) || !b.isLost() {
			t.Fatalf("%v, lost %v", err, b.isLost())
		}
	})
}

func TestCloseWaitsForItsOperationsAndBeatsMeanwhile(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a := x.machine("a")
		a.claim()
		release := make(chan struct{})
		a.dev.set(func(w *wire) { w.readHold = release })
		read := x.start(func() error { return a.s.Device().ReadAt(t.Context(), make([]byte, 512), dataOff) })
		closed := x.start(func() error { return a.s.Close(t.Context()) })
		x.tick(3 * testLease)
		if !pending(closed) || !pending(read) || x.register(0).Phase != lease.Live {
			t.Fatal("closed over an operation in progress")
		}
		if err := a.s.Device().WriteAt(t.Context(), block512('l'), dataOff); !errors.Is(err, block.ErrClosed) || x.data() != 0 {
			t.Fatalf("write during Close: %v, data %q", err, x.data())
		}
		close(release)
		x.tick(time.Second)
		if err := errors.Join(<-read, <-closed); err != nil || x.register(0).Phase != lease.Free {
			t.Fatalf("%v, register %+v", err, x.register(0))
		}
	})
}

func TestCloseThatCannotWaitLeavesTheSlotToOthers(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a := x.machine("a")
		a.claim()
		release := make(chan struct{})
		a.dev.set(func(w *wire) { w.readHold = release })
		read := x.start(func() error { return a.s.Device().ReadAt(context.Background(), make([]byte, 512), dataOff) })
		ctx, cancel := context.WithCancel(t.Context())
		closed := x.start(func() error { return a.s.Close(ctx) })
		cancel()
		x.tick(time.Second)
		if err := <-closed; !errors.Is(err, context.Canceled) || !a.isLost() {
			t.Fatal(err)
		}
		if r := x.register(0); r.Phase != lease.Live {
			t.Fatalf("register %+v", r)
		}
		if err := a.nexus.Flush(t.Context()); err != nil {
			t.Fatalf("the device was closed under an operation: %v", err)
		}
		close(release)
		x.tick(time.Second)
		if err := <-read; !errors.Is(err, lease.ErrLost) {
			t.Fatalf("read: %v", err)
		}
		if err := a.nexus.Flush(t.Context()); !errors.Is(err, block.ErrClosed) {
			t.Fatalf("the device stays open: %v", err)
		}
	})
}
