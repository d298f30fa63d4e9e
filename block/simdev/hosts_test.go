package simdev_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"basalt/block"
	"basalt/block/simdev"
)

func holder(slot int, generation uint32) block.Holder {
	return block.Holder{Slot: slot, Generation: generation, Fencers: block.FencePR}
}

// start runs do in a goroutine of its own and returns where its outcome arrives.
func start(do func() error) <-chan error {
	result := make(chan error, 1)
	go func() { result <- do() }()
	return result
}

func writeOf(d block.Device, v byte) func() error {
	return func() error { return d.WriteAt(context.Background(), fill(4096, v), 0) }
}

func TestKilledHostChangesNothingMore(t *testing.T) {
	lun := simdev.New(simdev.Options{})
	a, b := lun.Host("a"), lun.Host("b")
	must(t, a.WriteAt(t.Context(), fill(4096, 1), 0))
	a.Kill()
	if err := a.WriteAt(t.Context(), fill(4096, 2), 0); !errors.Is(err, simdev.ErrHostDead) {
		t.Errorf("write: %v, want %v", err, simdev.ErrHostDead)
	}
	if got := read(t, b, 0, 4096)[0]; got != 1 {
		t.Errorf("reads %d, want 1", got)
	}
}

func TestStopAfterLetsExactlyNChangesThrough(t *testing.T) {
	for n := range 4 {
		lun := simdev.New(simdev.Options{})
		a, b := lun.Host("a"), lun.Host("b")
		a.StopAfter(n)
		for i := range 4 {
			if i < n {
				read(t, a, 0, 4096) // reads do not count
			}
			err := a.WriteAt(t.Context(), fill(4096, 1), int64(i)*4096)
			if alive := i < n; alive != (err == nil) || !alive && !errors.Is(err, simdev.ErrHostDead) {
				t.Errorf("n = %d: write %d: %v", n, i, err)
			}
			want := byte(0)
			if i < n {
				want = 1
			}
			if got := read(t, b, int64(i)*4096, 4096)[0]; got != want {
				t.Errorf("n = %d: block %d reads %d, want %d", n, i, got, want)
			}
		}
		if err := a.ReadAt(t.Context(), make([]byte, 4096), 0); !errors.Is(err, simdev.ErrHostDead) {
			t.Errorf("n = %d: read by the dead host: %v", n, err)
		}
	}
}

func TestFrozenHostWaitsAtTheSubmitBoundary(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lun := simdev.New(simdev.Options{})
		a, b := lun.Host("a"), lun.Host("b")
		a.Freeze()
		result := start(writeOf(a, 1))
		synctest.Wait()
		if got := read(t, b, 0, 4096)[0]; got != 0 {
			t.Errorf("a frozen host wrote %d", got)
		}
		a.Thaw()
		must(t, <-result)
		if got := read(t, b, 0, 4096)[0]; got != 1 {
			t.Errorf("reads %d after the thaw, want 1", got)
		}
	})
}

func TestFrozenHostIsReleasedByItsEnd(t *testing.T) {
	for name, tt := range map[string]struct {
		end  func(*simdev.LUN, *simdev.Handle)
		want error
	}{
		"Kill":  {func(_ *simdev.LUN, h *simdev.Handle) { h.Kill() }, simdev.ErrHostDead},
		"Close": {func(_ *simdev.LUN, h *simdev.Handle) { h.Close() }, block.ErrClosed},
		"Crash": {func(l *simdev.LUN, _ *simdev.Handle) { l.Crash(rng(1)) }, block.ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				lun := simdev.New(simdev.Options{})
				a := lun.Host("a")
				a.Freeze()
				result := start(writeOf(a, 1))
				synctest.Wait()
				tt.end(lun, a)
				if err := <-result; !errors.Is(err, tt.want) {
					t.Errorf("%v, want %v", err, tt.want)
				}
				if got := read(t, lun.Host("b"), 0, 4096)[0]; got != 0 {
					t.Errorf("reads %d, want 0", got)
				}
			})
		})
	}
}

func TestContextEndsAFrozenCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := simdev.New(simdev.Options{}).Host("a")
		a.Freeze()
		ctx, cancel := context.WithCancel(t.Context())
		result := start(func() error { return a.Flush(ctx) })
		synctest.Wait()
		cancel()
		if err := <-result; !errors.Is(err, context.Canceled) {
			t.Errorf("%v, want %v", err, context.Canceled)
		}
	})
}

func TestHeldWriteLandsLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lun := simdev.New(simdev.Options{})
		a, b := lun.Host("a"), lun.Host("b")
		hold := a.HoldWrites()
		ctx, cancel := context.WithCancel(t.Context())
		p := fill(4096, 1)
		result := start(func() error { return a.WriteAt(ctx, p, 0) })
		must(t, hold.Await(t.Context(), 1))
		cancel()
		if err := <-result; !errors.Is(err, context.Canceled) {
			t.Fatalf("%v, want %v", err, context.Canceled)
		}
		clear(p) // the caller has its memory back
		must(t, b.WriteAt(t.Context(), fill(4096, 2), 0))
		a.Kill()
		must(t, hold.Land(0))
		if got := read(t, b, 0, 4096)[0]; got != 1 {
			t.Errorf("reads %d, want the late write's 1", got)
		}
		if err := hold.Land(0); err == nil {
			t.Error("landing a command that is not there succeeded")
		}
	})
}

func TestHeldCompareAndWriteComparesWhenItLands(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lun := simdev.New(simdev.Options{})
		a, b := lun.Host("a"), lun.Host("b")
		hold := a.HoldWrites()
		result := start(func() error {
			return a.CompareAndWrite(context.Background(), 0, fill(4096, 0), fill(4096, 1))
		})
		must(t, hold.Await(t.Context(), 1))
		must(t, b.CompareAndWrite(t.Context(), 0, fill(4096, 0), fill(4096, 2)))
		hold.Release()
		if err := <-result; !errors.Is(err, block.ErrMiscompare) {
			t.Errorf("%v, want %v", err, block.ErrMiscompare)
		}
		if got := read(t, b, 0, 4096)[0]; got != 2 {
			t.Errorf("reads %d, want 2", got)
		}
	})
}

func TestHeldWritesLandInTheChosenOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lun := simdev.New(simdev.Options{})
		a := lun.Host("a")
		hold := a.HoldWrites()
		var results []<-chan error
		for v := range byte(3) {
			results = append(results, start(writeOf(a, v+1)))
			must(t, hold.Await(t.Context(), int(v)+1))
		}
		must(t, hold.Land(1))
		if got := read(t, a, 0, 4096)[0]; got != 2 {
			t.Errorf("reads %d, want 2", got)
		}
		hold.Release()
		for _, r := range results {
			must(t, <-r)
		}
		if got := read(t, a, 0, 4096)[0]; got != 3 {
			t.Errorf("reads %d, want 3", got)
		}
		must(t, a.WriteAt(t.Context(), fill(4096, 4), 0)) // no longer held
	})
}

func TestFenceAbortsWhatIsInFlightAndRefusesTheRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lun := simdev.New(simdev.Options{})
		a, b := lun.Host("a"), lun.Host("b")
		must(t, a.Guard(t.Context(), 3, 7))
		hold := a.HoldWrites()
		result := start(writeOf(a, 1))
		must(t, hold.Await(t.Context(), 1))
		if err := b.Guard(t.Context(), 3, 8); !errors.Is(err, block.ErrBusy) {
			t.Errorf("guard of a held slot: %v, want %v", err, block.ErrBusy)
		}

		must(t, b.Fence(t.Context(), holder(3, 7)))
		if err := <-result; !errors.Is(err, block.ErrFenced) {
			t.Errorf("the write in flight: %v, want %v", err, block.ErrFenced)
		}
		if n := hold.Pending(); n != 0 {
			t.Errorf("%d commands in flight after the fence", n)
		}
		for name, err := range map[string]error{
			"held WriteAt":    a.WriteAt(t.Context(), fill(4096, 1), 0),
			"Guard":           a.Guard(t.Context(), 3, 7),
			"Fence":           a.Fence(t.Context(), holder(3, 8)),
			"CompareAndWrite": a.CompareAndWrite(t.Context(), 0, fill(4096, 0), fill(4096, 1)),
		} {
			if !errors.Is(err, block.ErrFenced) {
				t.Errorf("%s after the fence: %v, want %v", name, err, block.ErrFenced)
			}
		}
		hold.Release()
		for name, err := range map[string]error{
			"WriteAt":     a.WriteAt(t.Context(), fill(4096, 1), 0),
			"WriteFUA":    a.WriteFUA(t.Context(), fill(4096, 1), 0),
			"Flush":       a.Flush(t.Context()),
			"WriteZeroes": a.WriteZeroes(t.Context(), 0, 4096),
			"Discard":     a.Discard(t.Context(), 0, 4096),
		} {
			if !errors.Is(err, block.ErrFenced) {
				t.Errorf("%s after the fence: %v, want %v", name, err, block.ErrFenced)
			}
		}
		if got := read(t, a, 0, 4096)[0]; got != 0 {
			t.Errorf("reads %d, want 0", got)
		}
		must(t, b.Guard(t.Context(), 3, 8))
		must(t, b.Fence(t.Context(), holder(3, 7))) // again: nothing left to lose
	})
}

func TestFenceTakesOnlyTheNamedGeneration(t *testing.T) {
	lun := simdev.New(simdev.Options{})
	a, b := lun.Host("a"), lun.Host("b")
	must(t, a.Guard(t.Context(), 3, 7))
	must(t, b.Fence(t.Context(), holder(3, 6)))
	must(t, b.Fence(t.Context(), holder(2, 7)))
	must(t, a.WriteAt(t.Context(), fill(4096, 1), 0))
	h := holder(3, 7)
	h.Fencers = block.FenceOFD
	if err := b.Fence(t.Context(), h); !errors.Is(err, block.ErrNotSupported) {
		t.Errorf("a method not advertised: %v, want %v", err, block.ErrNotSupported)
	}
	if err := a.Fence(t.Context(), holder(3, 7)); !errors.Is(err, block.ErrBusy) {
		t.Errorf("fence of oneself: %v, want %v", err, block.ErrBusy)
	}
	must(t, a.WriteAt(t.Context(), fill(4096, 2), 0))
}

func TestFenceHitsAFrozenHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lun := simdev.New(simdev.Options{})
		a, b := lun.Host("a"), lun.Host("b")
		must(t, a.Guard(t.Context(), 0, 1))
		a.Freeze()
		result := start(writeOf(a, 1))
		synctest.Wait()
		must(t, b.Fence(t.Context(), holder(0, 1)))
		a.Thaw()
		if err := <-result; !errors.Is(err, block.ErrFenced) {
			t.Errorf("%v, want %v", err, block.ErrFenced)
		}
	})
}

func TestGoneOnlyWhenDeadAndNothingInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lun := simdev.New(simdev.Options{})
		a, b := lun.Host("a"), lun.Host("b")
		gone := func(when string, want bool) {
			t.Helper()
			got, err := b.Gone(t.Context(), holder(0, 1))
			if err != nil || got != want {
				t.Errorf("%s: gone = %v, %v, want %v", when, got, err, want)
			}
		}
		gone("never registered", false)
		must(t, a.Guard(t.Context(), 0, 1))
		gone("alive", false)
		hold := a.HoldWrites()
		result := start(writeOf(a, 1))
		must(t, hold.Await(t.Context(), 1))
		a.Kill()
		if err := <-result; !errors.Is(err, simdev.ErrHostDead) {
			t.Errorf("call of the killed host: %v", err)
		}
		gone("killed with a write in flight", false)
		must(t, hold.Land(0))
		gone("killed, nothing in flight", true)
	})
}

func TestUnguardFreesTheSlot(t *testing.T) {
	lun := simdev.New(simdev.Options{})
	a, b := lun.Host("a"), lun.Host("b")
	must(t, a.Guard(t.Context(), 0, 1))
	if err := a.Guard(t.Context(), 1, 1); !errors.Is(err, block.ErrBusy) {
		t.Errorf("a second key on one handle: %v, want %v", err, block.ErrBusy)
	}
	if err := b.Unguard(t.Context(), 0); err == nil {
		t.Error("unguard of another's slot succeeded")
	}
	must(t, a.Unguard(t.Context(), 0))
	must(t, b.Guard(t.Context(), 0, 2))
	must(t, a.WriteAt(t.Context(), fill(4096, 1), 0)) // unguarding is no fence
}

func TestCloseWaitsForHeldCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lun := simdev.New(simdev.Options{})
		a := lun.Host("a")
		hold := a.HoldWrites()
		write := start(writeOf(a, 1))
		must(t, hold.Await(t.Context(), 1))
		closing := start(a.Close)
		synctest.Wait()
		select {
		case err := <-closing:
			t.Fatalf("close returned %v with a call in progress", err)
		default:
		}
		hold.Release()
		must(t, <-write)
		must(t, <-closing)
		if got := read(t, lun.Host("b"), 0, 4096)[0]; got != 1 {
			t.Errorf("reads %d, want 1", got)
		}
	})
}
