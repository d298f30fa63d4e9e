package lease_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"basalt/block"
	"basalt/lease"
)

func server(o *lease.Options) { o.Server = true }

func named(name string) func(o *lease.Options) {
	return func(o *lease.Options) { o.HostName = name }
}

func TestSecondServerOfALiveNameIsRefused(t *testing.T) {
	inSite(t, 4, func(t *testing.T, x *site) {
		a, b := x.machine("a"), x.machine("b")
		a.claim(server)
		err := b.tryClaim(server, named("a"))
		if !errors.Is(err, lease.ErrNameInUse) {
			t.Fatal(err)
		}
		if r := x.register(1); r.Phase != lease.Free {
			t.Fatalf("the refused claim left %+v", r)
		}
		if err := b.nexus.ReadAt(t.Context(), make([]byte, 512), dataOff); err != nil {
			t.Fatalf("a failed Claim closed the caller's device: %v", err)
		}
		// A command of that name is welcome.
		b.claim(named("a"))
		if a.isLost() {
			t.Fatal("a lost its slot to its namesake")
		}
	})
}

func TestRestartedServerBreaksItsEarlierGeneration(t *testing.T) {
	for name, die := range map[string]func(m *machine){
		"proven gone": func(m *machine) { m.nexus.Kill() },
		"only silent": func(m *machine) { m.freeze() },
	} {
		t.Run(name, func(t *testing.T) {
			inSite(t, 4, func(t *testing.T, x *site) {
				a, again := x.machine("a"), x.machine("again")
				a.claim(server)
				x.tick(3 * time.Second)
				die(a)
				start := again.clk.Now()
				again.claim(server, named("a"))
				took := again.clk.Now().Sub(start)
				if r := x.register(0); r.Phase != lease.Done || again.s.Slot() != 1 {
					t.Fatalf("old register %+v, new slot %d", r, again.s.Slot())
				}
				if name == "proven gone" && took > 3*time.Second || name == "only silent" && took < testLease {
					t.Fatalf("took %v", took)
				}
			})
		})
	}
}

func TestCommandDoesNotWaitForASilentNamesake(t *testing.T) {
	inSite(t, 4, func(t *testing.T, x *site) {
		a, again := x.machine("a"), x.machine("again")
		a.claim(server)
		a.freeze()
		start := again.clk.Now()
		again.claim(named("a"))
		if took := again.clk.Now().Sub(start); took > time.Second {
			t.Fatalf("took %v", took)
		}
		if r := x.register(0); r.Phase != lease.Live {
			t.Fatalf("register %+v", r)
		}
	})
}

func TestFullAreaMakesRoomOnlyByADeadHolder(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a, b, c := x.machine("a"), x.machine("b"), x.machine("c")
		a.claim()
		b.claim()
		x.tick(time.Second)
		if err := c.tryClaim(); !errors.Is(err, lease.ErrNoSlot) {
			t.Fatal(err)
		}
		b.freeze()
		c.claim()
		if c.s.Slot() != 1 || c.s.Generation() != 2 || a.isLost() {
			t.Fatalf("slot %d generation %d", c.s.Slot(), c.s.Generation())
		}
		b.thaw()
		x.tick(time.Second)
		if !b.isLost() {
			t.Fatal("b still believes in its slot")
		}
	})
}

func TestFullAreaTakesTheSlotOfWhatIsProvenGoneAtOnce(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a, b, c := x.machine("a"), x.machine("b"), x.machine("c")
		a.claim()
		b.claim()
		b.nexus.Kill()
		start := c.clk.Now()
		c.claim()
		if took := c.clk.Now().Sub(start); c.s.Slot() != 1 || took > 3*time.Second {
			t.Fatalf("slot %d after %v", c.s.Slot(), took)
		}
	})
}

func TestClaimThatIsGivenUpReturnsItsSlotOrLeavesItToOthers(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a := x.machine("a")
		a.dev.set(func(w *wire) { w.failBeats = true })
		ctx, cancel := context.WithCancel(context.Background())
		claim := x.start(func() error { return a.claimWith(ctx, a.options()) })
		x.tick(3 * time.Second)
		if !pending(claim) || x.register(0).Phase != lease.Live {
			t.Fatal("claimed without a heartbeat")
		}
		cancel()
		x.tick(time.Second)
		if err := <-claim; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if r := x.register(0); r.Phase != lease.Free {
			t.Fatalf("register %+v", r)
		}
	})
}

func TestDeviceThatCannotExcludeHostsTakesOne(t *testing.T) {
	inSite(t, 4, func(t *testing.T, x *site) {
		a, b := x.machine("a"), x.machine("b")
		a.dev.set(func(w *wire) { w.notShared = true })
		b.dev.set(func(w *wire) { w.notShared = true })
		a.claim()
		if err := b.tryClaim(); !errors.Is(err, lease.ErrNotShared) {
			t.Fatal(err)
		}
		a.nexus.Kill()
		b.claim()
	})
}

func TestClaimerThatDiesBeforeItsFirstHeartbeatIsBroken(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a, b := x.machine("a"), x.machine("b")
		// The slot has been used: its heartbeat is of an earlier generation.
		a.claim()
		x.tick(3 * time.Second)
		if err := a.s.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		dead := x.machine("dead")
		dead.dev.set(func(w *wire) { w.afterCAW = dead.nexus.Kill })
		if err := dead.tryClaimUntilDead(); err == nil {
			t.Fatal("claimed")
		}
		b.claim()
		err := x.during(func(ctx context.Context) error { return b.s.Break(ctx, 0, 2) })
		if r := x.register(0); err != nil || r.Phase != lease.Done || r.Generation != 2 {
			t.Fatalf("%v, register %+v", err, r)
		}
	})
}

func TestOptionsAreChecked(t *testing.T) {
	bad := map[string]func(o *lease.Options){
		"no name":         func(o *lease.Options) { o.HostName = "" },
		"long name":       func(o *lease.Options) { o.HostName = strings.Repeat("n", 256) },
		"long address":    func(o *lease.Options) { o.Address = strings.Repeat("1", 65) },
		"short lease":     func(o *lease.Options) { o.Lease = time.Millisecond },
		"long lease":      func(o *lease.Options) { o.Lease = time.Hour },
		"odd lease":       func(o *lease.Options) { o.Lease = time.Second + 1 },
		"few heartbeats":  func(o *lease.Options) { o.Period = o.Lease / 3 },
		"negative period": func(o *lease.Options) { o.Period = -1 },
		"small budget":    func(o *lease.Options) { o.IOBudget = time.Millisecond },
		"large budget":    func(o *lease.Options) { o.IOBudget = time.Minute },
		"negative drain":  func(o *lease.Options) { o.Drain = -1 },
	}
	inSite(t, 2, func(t *testing.T, x *site) {
		for name, change := range bad {
			m := x.machine("m")
			if err := m.tryClaim(change); err == nil {
				t.Errorf("%s: claimed", name)
			}
		}
		for _, l := range []time.Duration{lease.MinLease, lease.FastLease, lease.DefaultLease, lease.MaxLease} {
			m := x.machine(fmt.Sprint(l))
			m.claim(func(o *lease.Options) { o.Lease = l })
			if err := m.s.Close(t.Context()); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestAreaMustFitTheDevice(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		for name, change := range map[string]func(a *lease.Area){
			"no slots":     func(a *lease.Area) { a.Slots = 0 },
			"many slots":   func(a *lease.Area) { a.Slots = 257 },
			"narrow":       func(a *lease.Area) { a.StrideBytes = 256 },
			"odd stride":   func(a *lease.Area) { a.StrideBytes = 4097 },
			"odd offset":   func(a *lease.Area) { a.RegisterOff++ },
			"beyond":       func(a *lease.Area) { a.HeartbeatOff = 16 << 20 },
			"overlap":      func(a *lease.Area) { a.RegisterOff = a.HeartbeatOff + 4096 },
			"other volume": func(a *lease.Area) { a.Volume[0]++ },
		} {
			area := x.area
			change(&area)
			views, err := lease.Observe(t.Context(), x.lun.Host("o"), area)
			if name == "other volume" {
				var damaged *block.CorruptError
				if err != nil || !errors.As(views[0].Err, &damaged) {
					t.Errorf("%s: %v, %v", name, err, views)
				}
				continue
			}
			if err == nil || lease.Format(t.Context(), x.lun.Host("o"), area) == nil {
				t.Errorf("%s: accepted", name)
			}
		}
	})
}
