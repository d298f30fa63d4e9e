package lease_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"basalt/block"
	"basalt/lease"
)

func TestClaimWriteCloseAndClaimAgain(t *testing.T) {
	inSite(t, 4, func(t *testing.T, x *site) {
		a := x.machine("a")
		a.claim(func(o *lease.Options) { o.Address, o.Server, o.HostID = "192.0.2.7", true, [16]byte{9} })
		if a.s.Slot() != 0 || a.s.Generation() != 1 {
			t.Fatalf("slot %d generation %d", a.s.Slot(), a.s.Generation())
		}
		r := x.register(0)
		if r.Phase != lease.Live || r.HostName != "a" || r.Address != "192.0.2.7" || !r.Server || r.Lease != testLease || r.Fencers != block.FencePR || r.HostID != [16]byte{9} {
			t.Fatalf("register %+v", r)
		}
		if err := a.s.Device().WriteAt(t.Context(), block512('x'), dataOff); err != nil {
			t.Fatal(err)
		}
		if err := a.s.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := a.s.Device().WriteAt(t.Context(), block512('y'), dataOff); !errors.Is(err, block.ErrClosed) {
			t.Fatalf("write after Close: %v", err)
		}
		if r := x.register(0); r.Phase != lease.Free || r.Generation != 1 || x.data() != 'x' {
			t.Fatalf("register %+v, data %c", r, x.data())
		}
		b := x.machine("b")
		b.claim()
		if b.s.Slot() != 0 || b.s.Generation() != 2 {
			t.Fatalf("slot %d generation %d", b.s.Slot(), b.s.Generation())
		}
		if dead, err := b.s.Dead(t.Context(), 0, 1); err != nil || !dead {
			t.Fatalf("earlier generation dead: %v, %v", dead, err)
		}
		if dead, err := b.s.Dead(t.Context(), 0, 2); err != nil || dead {
			t.Fatalf("own generation dead: %v, %v", dead, err)
		}
	})
}

func TestUnitsOf4096BytesWorkAlike(t *testing.T) {
	inSiteOf(t, 4096, 2, func(t *testing.T, x *site) {
		a, b := x.machine("a"), x.machine("b")
		a.claim()
		b.claim()
		b.freeze()
		if err := a.breakHost(b); err != nil {
			t.Fatal(err)
		}
		if r := x.register(1); r.Phase != lease.Done {
			t.Fatalf("register %+v", r)
		}
	})
}

func TestFormatAndClaimsSurvivePowerFailure(t *testing.T) {
	inSite(t, 3, func(t *testing.T, x *site) {
		a := x.machine("a")
		a.claim()
		for seed := range uint64(20) {
			after := x.lun.CrashClone(rand.New(rand.NewPCG(seed, 0)))
			views, err := lease.Observe(t.Context(), after.Host("o"), x.area)
			if err != nil {
				t.Fatal(err)
			}
			for _, v := range views {
				if v.Err != nil || v.Slot == 0 && v.Register.Phase != lease.Live || v.Slot != 0 && v.Register.Phase != lease.Free {
					t.Fatalf("%+v", v)
				}
			}
		}
	})
}

// Many writers through outages and a Close: none is let past, none is forgotten.
func TestNothingReachesTheDeviceAfterClose(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a := x.machine("a")
		a.claim()
		var writers []<-chan error
		for range 50 {
			writers = append(writers, x.start(func() error {
				for {
					if err := a.s.Device().WriteAt(context.Background(), block512('n'), dataOff); err != nil {
						return err
					}
					pause := a.clk.NewTimer(30 * time.Millisecond)
					<-pause.C
				}
			}))
		}
		for range 3 {
			a.dev.set(func(w *wire) { w.failBeats = true })
			x.tick(testLease + 2*time.Second)
			before := a.changes()
			x.tick(time.Minute)
			if got := a.changes() - before; got != 0 {
				t.Fatalf("%d changes without a lease", got)
			}
			a.dev.set(func(w *wire) { w.failBeats = false })
			x.tick(2 * time.Second)
			if a.changes() == before {
				t.Fatal("the writers do not go on")
			}
		}
		if err := x.during(func(ctx context.Context) error { return a.s.Close(ctx) }); err != nil {
			t.Fatal(err)
		}
		before := a.changes()
		x.tick(time.Second)
		for _, w := range writers {
			if err := <-w; !errors.Is(err, block.ErrClosed) {
				t.Fatal(err)
			}
		}
		if got := a.changes() - before; got != 0 {
			t.Fatalf("%d changes after Close", got)
		}
	})
}

func TestHostsThatClaimAtOnceGetDifferentSlots(t *testing.T) {
	inSite(t, 8, func(t *testing.T, x *site) {
		var done []<-chan error
		for _, name := range []string{"a", "b", "c", "d", "e", "f"} {
			m := x.machine(name)
			done = append(done, x.start(func() error { return m.tryClaimNow(t.Context()) }))
		}
		x.tick(time.Second)
		var slots []int
		for i, m := range x.machines {
			if err := <-done[i]; err != nil {
				t.Fatal(err)
			}
			slots = append(slots, m.s.Slot())
			if m.s.Generation() != 1 {
				t.Errorf("generation %d", m.s.Generation())
			}
		}
		slices.Sort(slots)
		if len(slices.Compact(slots)) != 6 {
			t.Fatalf("slots %v", slots)
		}
	})
}

// A fencer that guards nothing leaves it to the register alone who gets the slot.
func TestTheRegisterDecidesWhoGetsASlot(t *testing.T) {
	for name, hook := range map[string]func(w *wire, faster func()){
		"between look and change":  func(w *wire, faster func()) { w.beforeCAW = faster },
		"between listing and look": func(w *wire, faster func()) { w.atClaim = faster },
	} {
		t.Run(name, func(t *testing.T) {
			inSite(t, 2, func(t *testing.T, x *site) {
				a, b := x.machine("a"), x.machine("b")
				a.fencer, b.fencer = paperFencer{}, paperFencer{}
				a.dev.set(func(w *wire) {
					hook(w, func() {
						if err := b.tryClaimNow(context.Background()); err != nil {
							t.Error(err)
						}
					})
				})
				a.claim()
				if a.s.Slot() != 1 || b.s.Slot() != 0 {
					t.Fatalf("slots %d and %d", a.s.Slot(), b.s.Slot())
				}
			})
		})
	}
}

func TestClaimWhoseReplyIsLostIsNotMadeTwice(t *testing.T) {
	inSite(t, 4, func(t *testing.T, x *site) {
		a := x.machine("a")
		a.dev.set(func(w *wire) { w.loseCAW = true })
		a.claim()
		if a.s.Slot() != 0 || a.s.Generation() != 1 || x.register(1).Phase != lease.Free {
			t.Fatalf("slot %d generation %d, slot 1 %+v", a.s.Slot(), a.s.Generation(), x.register(1))
		}
	})
}

func TestHeartbeatsArePlainWrites(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a := x.machine("a")
		a.claim()
		before := a.nexus.Stats()
		x.tick(20 * time.Second)
		after := a.nexus.Stats()
		if after.CAWs != before.CAWs || after.FUAs != before.FUAs || after.Flushes != before.Flushes {
			t.Fatalf("%+v became %+v", before, after)
		}
		if beats := after.Writes - before.Writes; beats < 19 || beats > 21 {
			t.Fatalf("%d heartbeats in 20 s", beats)
		}
	})
}

func TestHeartbeatThatWasStoppedBeforeItsSubmitIsNotWritten(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a := x.machine("a")
		stop := false
		a.claim(func(o *lease.Options) {
			n := uint64(0)
			o.Nonce = func() uint64 {
				if n++; stop { // in the middle of making the heartbeat
					stop = false
					a.clk.Advance(3 * testPeriod)
				}
				return n
			}
		})
		before := a.changes()
		stop = true
		a.clk.Advance(testPeriod)
		synctest.Wait()
		if stop || a.changes() != before {
			t.Fatalf("stopped %v, %d heartbeats written after it", !stop, a.changes()-before)
		}
		x.tick(testPeriod)
		if a.changes() == before || a.isLost() {
			t.Fatal("the heartbeats do not go on")
		}
	})
}

func TestOperationsAreHeldWhileTheLeaseIsInDoubt(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a := x.machine("a")
		a.claim()
		a.dev.set(func(w *wire) { w.failBeats = true })
		x.tick(testLease + time.Second)
		write := x.start(func() error { return a.s.Device().WriteAt(t.Context(), block512('h'), dataOff) })
		ctx, cancel := context.WithCancel(t.Context())
		given := x.start(func() error { return a.s.Device().ReadAt(ctx, make([]byte, 512), dataOff) })
		x.tick(time.Minute)
		if !pending(write) || x.data() != 0 {
			t.Fatal("the write went past an expired lease")
		}
		cancel()
		if err := <-given; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		a.dev.set(func(w *wire) { w.failBeats = false })
		x.tick(2 * time.Second)
		if err := <-write; err != nil || x.data() != 'h' || a.isLost() || x.register(0).Generation != 1 {
			t.Fatalf("%v, data %q, lost %v", err, x.data(), a.isLost())
		}
	})
}

func TestAnswersAreHeldWhileTheLeaseIsInDoubt(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a := x.machine("a")
		a.claim()
		release := make(chan struct{})
		hold := a.nexus.HoldWrites()
		write := x.start(func() error { return a.s.Device().WriteAt(t.Context(), block512('w'), dataOff) })
		a.dev.set(func(w *wire) { w.failBeats, w.readHold = true, release })
		read := x.start(func() error { return a.s.Device().ReadAt(t.Context(), make([]byte, 512), dataOff) })
		x.tick(testLease + time.Second)
		hold.Release() // both were submitted under a valid lease, and end now
		close(release)
		x.tick(time.Second)
		if x.data() != 'w' || !pending(write) || !pending(read) {
			t.Fatal("acknowledged without a lease")
		}
		a.dev.set(func(w *wire) { w.failBeats = false })
		x.tick(2 * time.Second)
		if err := errors.Join(<-write, <-read); err != nil {
			t.Fatal(err)
		}
	})
}

func TestThawAfterKillSubmitsNothing(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a, b := x.machine("a"), x.machine("b")
		a.fencer, b.fencer = paperFencer{}, paperFencer{}
		a.claim()
		b.claim()
		x.tick(3 * time.Second)
		b.freeze()
		if err := a.breakHost(b); err != nil {
			t.Fatal(err)
		}
		before := b.changes()
		b.thaw()
		write := x.start(func() error { return b.s.Device().WriteAt(t.Context(), block512('b'), dataOff) })
		x.tick(5 * time.Second)
		if got := b.changes() - before; got != 0 || x.data() != 0 {
			t.Fatalf("%d changes after KILL, data %q", got, x.data())
		}
		if err := <-write; !errors.Is(err, lease.ErrLost) {
			t.Fatalf("held write: %v", err)
		}
		if !b.isLost() || !errors.Is(b.s.Err(), lease.ErrLost) {
			t.Fatalf("lost %v, err %v", b.isLost(), b.s.Err())
		}
		if err := b.nexus.ReadAt(t.Context(), make([]byte, 512), dataOff); !errors.Is(err, block.ErrClosed) {
			t.Fatalf("the lost host's device is still open: %v", err)
		}
		if err := b.s.Close(t.Context()); !errors.Is(err, lease.ErrLost) {
			t.Fatalf("Close of a lost session: %v", err)
		}
	})
}

func TestWithdrawnKillDoesNotBringAGenerationBack(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a, b := x.machine("a"), x.machine("b")
		a.claim()
		b.claim()
		hold := b.nexus.HoldWrites()
		a.dev.set(func(w *wire) {
			// The heartbeat that b has on its way lands just before KILL, and b reads
			// its register just after it.
			w.beforeCAW = func() {
				b.nexus.Freeze()
				if err := hold.Land(hold.Pending() - 1); err != nil {
					t.Error(err)
				}
			}
			w.afterCAW = func() {
				b.nexus.Thaw()
				<-b.s.Lost()
			}
		})
		if err := a.breakHost(b); !errors.Is(err, lease.ErrAlive) {
			t.Fatal(err)
		}
		if r := x.register(1); r.Phase != lease.Live || r.Generation != 1 {
			t.Fatalf("register %+v", r)
		}
		before := b.changes()
		hold.Release()
		landed := b.changes() - before
		x.tick(testLease)
		if got := b.changes() - before - landed; got != 0 || !b.isLost() {
			t.Fatalf("%d changes after KILL was withdrawn, lost %v", got, b.isLost())
		}
		if err := a.breakHost(b); err != nil { // and it is broken in the end
			t.Fatal(err)
		}
	})
}

func TestFenceAbortsWhatIsStillOnItsWay(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a, b := x.machine("a"), x.machine("b")
		a.claim()
		b.claim()
		x.tick(3 * time.Second)
		hold := b.nexus.HoldWrites()
		write := x.start(func() error { return b.s.Device().WriteAt(context.Background(), block512('b'), dataOff) })
		b.freeze()
		if err := a.breakHost(b); err != nil {
			t.Fatal(err)
		}
		hold.Release()
		if x.data() != 0 {
			t.Fatal("a write from before the fence landed after DONE")
		}
		b.thaw()
		if err := <-write; !errors.Is(err, block.ErrFenced) {
			t.Fatalf("write: %v", err)
		}
		if !b.isLost() {
			t.Fatal("a refused write did not end the generation")
		}
	})
}

func TestStallOfTheWholeSANKillsNobody(t *testing.T) {
	inSite(t, 4, func(t *testing.T, x *site) {
		for _, name := range []string{"a", "b", "c"} {
			m := x.machine(name)
			m.claim()
			x.wg.Go(func() { _ = m.s.Watch(t.Context()) })
		}
		x.tick(5 * time.Second)
		for _, stall := range []time.Duration{5 * time.Second, 9 * time.Second, time.Minute} {
			for _, m := range x.machines {
				m.nexus.Freeze()
			}
			x.tick(stall)
			for i, m := range x.machines { // paths come back one after the other
				x.tick(time.Duration(i) * 300 * time.Millisecond)
				m.nexus.Thaw()
			}
			x.tick(20 * time.Second)
		}
		for _, m := range x.machines {
			if m.isLost() || len(m.breaks) > 0 {
				t.Errorf("%s: lost %v, breaks %+v", m.name, m.isLost(), m.breaks)
			}
			if err := m.s.Device().WriteAt(t.Context(), block512('s'), dataOff); err != nil {
				t.Error(err)
			}
		}
		for _, m := range x.machines {
			_ = m.s.Close(t.Context())
		}
	})
}

func TestWatchCutsADeadHostOff(t *testing.T) {
	inSite(t, 8, func(t *testing.T, x *site) {
		for _, name := range []string{"a", "b", "c"} {
			m := x.machine(name)
			m.claim()
		}
		a, b, c := x.machines[0], x.machines[1], x.machines[2]
		for _, m := range []*machine{a, c} {
			x.wg.Go(func() { _ = m.s.Watch(t.Context()) })
		}
		x.tick(5 * time.Second)
		b.freeze()
		x.tick(testLease + 4*time.Second)
		if r := x.register(1); r.Phase != lease.Done {
			t.Fatalf("register %+v", r)
		}
		reports := slices.Concat(a.breaks, c.breaks)
		if len(reports) == 0 || reports[0].Err != nil || reports[0].HostName != "b" || reports[0].Silence < testLease {
			t.Fatalf("reports %+v", reports)
		}
		if dead, err := a.s.Dead(t.Context(), 1, 1); err != nil || !dead {
			t.Fatalf("dead %v, %v", dead, err)
		}
		_, _ = a.s.Close(t.Context()), c.s.Close(t.Context())
	})
}

func TestWatchLooksPastTheHostsThatItCannotCutOff(t *testing.T) {
	inSite(t, 8, func(t *testing.T, x *site) {
		a := x.machine("a")
		a.claim()
		for _, name := range []string{"b", "c", "d", "e", "f"} {
			m := x.machine(name)
			if name != "f" {
				m.fencer = paperFencer{} // offers what a does not have
			}
			m.claim()
		}
		x.wg.Go(func() { _ = a.s.Watch(t.Context()) })
		x.tick(3 * time.Second)
		for _, m := range x.machines[1:] {
			m.freeze()
		}
		x.tick(4 * testLease)
		if r := x.register(5); r.Phase != lease.Done || r.HostName != "f" {
			t.Fatalf("the neighbour behind is not cut off: %+v", r)
		}
		if r := x.register(1); r.Phase != lease.Live || !slices.ContainsFunc(a.breaks, func(r lease.BreakReport) bool {
			return r.Slot == 1 && errors.Is(r.Err, lease.ErrUnfenced)
		}) {
			t.Fatalf("register %+v, reports %+v", r, a.breaks)
		}
		if err := a.s.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

func TestWatchBreaksAtOnceWhatIsProvenGone(t *testing.T) {
	inSite(t, 4, func(t *testing.T, x *site) {
		a, b := x.machine("a"), x.machine("b")
		a.claim()
		b.claim()
		x.wg.Go(func() { _ = a.s.Watch(t.Context()) })
		x.tick(3 * time.Second)
		b.nexus.Kill()
		x.tick(5 * time.Second)
		if r := x.register(1); r.Phase != lease.Done || len(a.breaks) != 1 || !a.breaks[0].Proven {
			t.Fatalf("register %+v, reports %+v", r, a.breaks)
		}
		if err := a.s.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

func TestCallsAtOnceAllSucceed(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a, b := x.machine("a"), x.machine("b")
		a.claim()
		b.claim()
		var calls []<-chan error
		for range 8 {
			calls = append(calls, x.start(func() error { return a.s.Call(t.Context(), 1, 1) }))
		}
		a.dev.set(func(w *wire) { w.loseCAW = true })
		calls = append(calls, x.start(func() error { return a.s.Call(t.Context(), 1, 1) }))
		for _, c := range calls {
			if err := <-c; err != nil {
				t.Fatal(err)
			}
		}
		if r := x.register(1); r.Calls != 9 {
			t.Fatalf("%d calls", r.Calls)
		}
	})
}

func TestCallReachesItsHolderAndNoOther(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a, b := x.machine("a"), x.machine("b")
		a.claim()
		b.claim()
		if err := a.s.Call(t.Context(), b.s.Slot(), b.s.Generation()); err != nil {
			t.Fatal(err)
		}
		x.tick(1500 * time.Millisecond)
		select {
		case <-b.s.Calls():
		default:
			t.Fatal("b was not called")
		}
		select {
		case <-a.s.Calls():
			t.Fatal("a was called")
		default:
		}
		if err := a.s.Call(t.Context(), b.s.Slot(), b.s.Generation()+1); !errors.Is(err, lease.ErrDead) {
			t.Fatal(err)
		}
	})
}

func TestStuckHeartbeatIsGivenUpAndWrittenAnew(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a := x.machine("a")
		a.claim()
		hold := a.nexus.HoldWrites()
		x.tick(4500 * time.Millisecond) // issued at 1 s, to be given up 4 s later
		if got := hold.Pending(); got != 1 {
			t.Fatalf("%d heartbeats at once", got)
		}
		x.tick(2 * time.Second)
		if got := hold.Pending(); got != 2 {
			t.Fatalf("%d heartbeats on their way after the first was given up", got)
		}
		hold.Release() // the second confirms the lease before the first would have ended
		x.tick(2 * time.Second)
		if err := a.s.Device().WriteAt(t.Context(), block512('g'), dataOff); err != nil || x.data() != 'g' {
			t.Fatal(err)
		}
	})
}
