package vmfs_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"testing"

	"basalt/block"
	"basalt/block/faultdev"
	"basalt/block/simdev"
	"basalt/vmfs"
)

// R1: whatever becomes of one compare-and-write, of which the host is told nothing,
// the operation succeeds and has its effect once; and a command that lands long
// after, when another host has gone on, has none. Taking the superseding out of
// block/unit's Swap, or a test for one's own entries out of an edit here, fails this.
func TestAmbiguousCompareAndWriteHasNoEffectOfItsOwn(t *testing.T) {
	for _, s := range scenarios() {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			p := prepare(t, s)
			for k := 1; k <= p.caws; k++ {
				for _, effect := range []faultdev.Effect{faultdev.FailAfter, faultdev.Late, faultdev.FailBefore} {
					inSite(t, p.lun, func(x *site) { p.ambiguous(x, k, effect) })
				}
			}
		})
	}
}

func (p *prepared) ambiguous(x *site, k int, effect faultdev.Effect) {
	what := fmt.Sprintf("%v at compare-and-write %d of %d", effect, k, p.caws)
	var dev *faultdev.Device
	a := x.mountThrough("a", func(d block.Device) block.Device {
		dev = faultdev.New(d, faultdev.Rule{Ops: faultdev.CAW, Nth: p.mountCAWs + k, Effect: effect})
		return dev
	})
	if err := p.run(x.t.Context(), a.Volume); err != nil {
		x.t.Errorf("%s: %v", what, err)
	}
	if len(dev.Injections()) != 1 {
		x.t.Errorf("%s: %d faults were injected", what, len(dev.Injections()))
	}
	// Another host builds upon it before the late command lands.
	b := x.mount("b")
	p.touch(x, b, "")
	if err := put(x.t.Context(), b.Volume, "/late", 2<<20, 9); err != nil {
		x.t.Errorf("%s: %v", what, err)
	}
	if err := dev.Release(x.t.Context()); err != nil && !errors.Is(err, block.ErrMiscompare) {
		x.t.Errorf("%s: late command: %v", what, err)
	}
	if err := b.Remove(x.t.Context(), "/late"); err != nil {
		x.t.Errorf("%s: %v", what, err)
	}
	if now := tree(x.t, b.Volume); !maps.Equal(now, p.after) {
		x.t.Errorf("%s: the volume shows%s\nit should be%s", what, describe(now), describe(p.after))
	}
	if now := used(x.t, b.Volume); now != p.usedAfter {
		x.t.Errorf("%s: %d bytes are used in the end, want %d", what, now, p.usedAfter)
	}
	x.leave()
	x.check(what, vmfs.Note)
}

// R9, R20 as the volume sees them: a host freezes with a command under way, at each
// command, and another one breaks it. The command and all that follow it take no
// effect any more, whatever the volume has become by then.
func TestFrozenHostIsCutOffWithItsCommandUnderWay(t *testing.T) {
	for _, s := range scenarios() {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			p := prepare(t, s)
			for _, n := range p.points() {
				inSite(t, p.lun, func(x *site) { p.freeze(x, n) })
			}
		})
	}
}

// freeze lets the host stop with its change n+1 on its way to the LUN.
func (p *prepared) freeze(x *site, n int) {
	a := x.mount("a")
	hold := make(chan *simdev.Hold, 1)
	seen := 0
	x.lun.OnChange(func(int) {
		if seen++; seen == n {
			hold <- a.nexus.HoldWrites()
		}
	})
	if n == 0 {
		hold <- a.nexus.HoldWrites()
	}
	ctx, cancel := context.WithCancel(x.t.Context())
	defer cancel()
	var err error
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		err = p.run(ctx, a.Volume)
	}()
	acked := false
	select {
	case k := <-hold:
		if err := k.Await(x.t.Context(), 1); err != nil {
			x.t.Error(err)
		}
	case <-ended:
	}
	select {
	case <-ended:
		acked = err == nil
	default:
	}
	x.lun.OnChange(nil)
	p.verify(x, fmt.Sprintf("host froze with change %d of %d under way", n+1, p.changes), acked)
	<-ended
}
