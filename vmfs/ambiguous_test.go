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
			p := prepare(t, s)
			for k := 1; k <= p.caws; k++ {
				for _, effect := range []faultdev.Effect{faultdev.FailAfter, faultdev.Late} {
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
	if err := newDisk(x.t.Context(), b.Volume, "/late", 2, vmfs.Ref{}); err != nil {
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
			p := prepare(t, s)
			for i, n := range p.points() {
				if i%2 == 1 {
					continue // TestCrashAfterEveryWrite stops there too
				}
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

// meddler is a device on which another host interferes with one compare-and-write
// within a span: before it reaches the media, or after, and then it reports a
// failure of what has taken effect.
type meddler struct {
	block.Device
	within        block.Range
	before, after func()
}

func (d *meddler) CompareAndWrite(ctx context.Context, off int64, compare, write []byte) error {
	hit := off >= d.within.OffBytes && off < d.within.OffBytes+d.within.LenBytes
	if before := d.before; hit && before != nil {
		d.before = nil
		before()
	}
	err := d.Device.CompareAndWrite(ctx, off, compare, write)
	if after := d.after; hit && err == nil && after != nil {
		d.after = nil
		after()
		err = errors.New("the reply was lost")
	}
	return err
}

func (x *site) mountMeddled(name string, d *meddler) *host {
	return x.mountThrough(name, func(dev block.Device) block.Device {
		d.Device = dev
		return d
	})
}

// R1: a change that took effect and was built upon before it could be read back is
// judged by one's own entries, and not made a second time. Guards the count of own
// tags in Claim, without which the disk would get twice what it asked for.
func TestClaimThatOthersBuiltUponIsNotMadeTwice(t *testing.T) {
	inSite(t, newLUN(t, 128<<20, 512), func(x *site) {
		ctx := x.t.Context()
		b := x.mount("b")
		d := &meddler{within: block.Range{OffBytes: vmfs.GroupsOff, LenBytes: 9 * 512}}
		a := x.mountMeddled("a", d)
		if err := a.Mkdir(ctx, "/x"); err != nil {
			x.t.Fatal(err)
		}
		d.after = func() {
			if err := newDisk(ctx, b.Volume, "/other", 1, vmfs.Ref{}); err != nil {
				x.t.Error(err)
			}
		}
		if err := newDisk(ctx, a.Volume, "/x/d", 3, vmfs.Ref{}); err != nil {
			x.t.Error(err)
		}
		if d.after != nil {
			x.t.Error("nobody meddled")
		}
		if n := used(x.t, a.Volume); n != 4<<20 {
			x.t.Errorf("%d bytes are used by disks of 3 MiB and 1 MiB", n)
		}
		x.leave()
		x.check("in the end", vmfs.Note)
	})
}

// R3: a rename moves the object that it looked up, or nothing. Guards the comparison
// in renameIn: a folder that took the file's name meanwhile would move without the
// volume lock that keeps folders from forming a ring.
func TestRenameMovesNothingElse(t *testing.T) {
	inSite(t, newLUN(t, 128<<20, 512), func(x *site) {
		ctx := x.t.Context()
		b := x.mount("b")
		for _, err := range []error{put(ctx, b.Volume, "/f", 10, 1), b.Mkdir(ctx, "/to")} {
			if err != nil {
				x.t.Fatal(err)
			}
		}
		d := &meddler{within: block.Range{OffBytes: objectAt(1), LenBytes: 512}}
		a := x.mountMeddled("a", d)
		d.before = func() {
			for _, err := range []error{b.Remove(ctx, "/f"), b.Mkdir(ctx, "/f")} {
				if err != nil {
					x.t.Error(err)
				}
			}
		}
		if err := a.Rename(ctx, "/f", "/to/g"); !errors.Is(err, vmfs.ErrNotFound) {
			x.t.Errorf("rename of a file that a folder replaced: %v", err)
		}
		if now := tree(x.t, a.Volume); now["f"] != vmfs.KindFolder.String() || len(now) != 2 {
			x.t.Errorf("the volume shows%s", describe(now))
		}
	})
}

// R1, R17: when a host cannot learn whether its clone began, and takes the reference
// back, the clone must not begin later. Guards the superseding in dependsOn.
func TestUncountedCloneNeverBegins(t *testing.T) {
	inSite(t, newLUN(t, 128<<20, 512), func(x *site) {
		ctx := x.t.Context()
		b := x.mount("b")
		for _, err := range []error{newDisk(ctx, b.Volume, "/d", 1, vmfs.Ref{}), publish(ctx, b.Volume, "/d"), clone(ctx, b.Volume, "/d", "/c")} {
			if err != nil {
				x.t.Fatal(err)
			}
		}
		x.leave()
		// The next free slot is 5. The third read of its identity is the last before
		// it changes; then come the 16 that ask what became of the change.
		identity := block.Range{OffBytes: objectAt(5) + identityIn, LenBytes: 512}
		rules := []faultdev.Rule{{Ops: faultdev.CAW, Within: identity, Nth: 1, Effect: faultdev.Late}}
		for n := range 16 {
			rules = append(rules, faultdev.Rule{Ops: faultdev.Read, Within: identity, Nth: 4 + n, Effect: faultdev.FailBefore})
		}
		var dev *faultdev.Device
		a := x.mountThrough("a", func(d block.Device) block.Device {
			dev = faultdev.New(d, rules...)
			return dev
		})
		if err := clone(ctx, a.Volume, "/d", "/c2"); err == nil || dev.Held() != 1 {
			x.t.Fatalf("clone with an unknown outcome: %v, %d commands on their way", err, dev.Held())
		}
		if err := dev.Release(ctx); !errors.Is(err, block.ErrMiscompare) {
			x.t.Errorf("the late command landed: %v", err)
		}
		if err := unpublish(ctx, a.Volume, "/d"); !errors.Is(err, vmfs.ErrInUse) {
			x.t.Errorf("unpublishing the origin of a clone: %v", err)
		}
		x.leave()
		x.check("in the end", vmfs.Note)
	})
}
