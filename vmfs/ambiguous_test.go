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
// after, when another host has gone on, has none.
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

// meddler is a device whose next compare-and-write within a span takes effect, is
// followed by another host's change of the same unit, and then reports a failure.
type meddler struct {
	block.Device
	within block.Range
	meddle func()
}

func (d *meddler) CompareAndWrite(ctx context.Context, off int64, compare, write []byte) error {
	err := d.Device.CompareAndWrite(ctx, off, compare, write)
	if err == nil && d.meddle != nil && off >= d.within.OffBytes && off < d.within.OffBytes+d.within.LenBytes {
		meddle := d.meddle
		d.meddle = nil
		meddle()
		err = errors.New("the reply was lost")
	}
	return err
}

// R1: a change that took effect and was built upon before it could be read back is
// judged by one's own entries, and not made a second time. Guards the count of own
// tags in Claim, without which the file would own slabs that it does not name.
func TestClaimThatOthersBuiltUponIsNotMadeTwice(t *testing.T) {
	inSite(t, newLUN(t, 128<<20, 512), func(x *site) {
		ctx := x.t.Context()
		b := x.mount("b")
		d := &meddler{within: block.Range{OffBytes: vmfs.GroupsOff, LenBytes: 9 * 512}}
		a := x.mountThrough("a", func(dev block.Device) block.Device {
			d.Device = dev
			return d
		})
		d.meddle = func() {
			if err := newDisk(ctx, b.Volume, "/other", 1, vmfs.Ref{}); err != nil {
				x.t.Error(err)
			}
		}
		if err := a.Mkdir(ctx, "/x"); err != nil {
			x.t.Fatal(err)
		}
		if err := put(ctx, a.Volume, "/x/f", 3<<20, 1); err != nil {
			x.t.Error(err)
		}
		if d.meddle != nil {
			x.t.Error("nobody meddled")
		}
		if n := used(x.t, a.Volume); n != 4<<20 {
			x.t.Errorf("%d bytes are used by a file of 3 MiB and a disk of 1 MiB", n)
		}
		x.leave()
		x.check("in the end", vmfs.Note)
	})
}
