package vmfs_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"testing"

	"basalt/vmfs"
)

// Cancelling an operation at any moment leaves it done or not done, no lock held,
// no object half created, and no space used.
func TestCancelledOperationLeavesNothingHalfDone(t *testing.T) {
	for _, s := range scenarios() {
		t.Run(s.name, func(t *testing.T) {
			p := prepare(t, s)
			for _, n := range p.points() {
				inSite(t, p.lun, func(x *site) { p.cancel(x, n) })
			}
		})
	}
}

func (p *prepared) cancel(x *site, n int) {
	what := fmt.Sprintf("cancelled after %d of %d changes", n, p.changes)
	a := x.mount("a")
	ctx, cancel := context.WithCancel(x.t.Context())
	defer cancel()
	seen := 0
	x.lun.OnChange(func(int) {
		if seen++; seen == n {
			cancel()
		}
	})
	if n == 0 {
		cancel()
	}
	err := p.run(ctx, a.Volume)
	x.lun.OnChange(nil)
	if err != nil && !errors.Is(err, context.Canceled) {
		x.t.Errorf("%s: %v", what, err)
	}
	held, herr := a.LocksHeld(x.t.Context())
	if len(held) != 0 || herr != nil {
		x.t.Errorf("%s: locks are held: %v (%v)", what, held, herr)
	}
	want, wantUsed := p.before, p.usedBefore
	if err == nil {
		want, wantUsed = p.after, p.usedAfter
	}
	if now := tree(x.t, a.Volume); !maps.Equal(now, want) {
		x.t.Errorf("%s (%v): the volume shows%s\nit should be%s", what, err, describe(now), describe(want))
	}
	if now := used(x.t, a.Volume); now != wantUsed {
		x.t.Errorf("%s: %d bytes are used, want %d", what, now, wantUsed)
	}
	r, cerr := a.Check(x.t.Context(), diskSlabs)
	if cerr != nil || len(r.Findings) > 0 {
		x.t.Errorf("%s: check finds %+v (%v)", what, r, cerr)
	}
}

// A holder in the same process is told at once, not waited for without end.
func TestOpenObjectIsHeldAgainstItsOwnMount(t *testing.T) {
	inSite(t, newLUN(t, 128<<20, 512), func(x *site) {
		ctx := x.t.Context()
		a := x.mount("a")
		if err := newDisk(ctx, a.Volume, "/d", 1, vmfs.Ref{}); err != nil {
			x.t.Fatal(err)
		}
		err := withDisk(ctx, a.Volume, "/d", func(*vmfs.Object, testDisk) error {
			before := x.clk.Now()
			err := a.Remove(ctx, "/d")
			held, ok := errors.AsType[*vmfs.HeldError](err)
			if !ok || held.HostName != "a" {
				x.t.Errorf("removal of an open disk: %v", err)
			}
			if waited := x.clk.Now().Sub(before); waited > siteTick {
				x.t.Errorf("it took %v to find out", waited)
			}
			return nil
		})
		if err != nil {
			x.t.Fatal(err)
		}
		if err := a.Remove(ctx, "/d"); err != nil {
			x.t.Error(err)
		}
	})
}
