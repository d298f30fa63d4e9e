package vmfs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
	"time"

	"basalt/block"
	"basalt/block/faultdev"
	"basalt/vmfs"
)

const (
	gib          = 1 << 30
	objectBytes  = vmfs.ObjectBytes
	identityIn   = 4 << 10  // of an object's place: docs/format/volume.md §5
	headerAIn    = 8 << 10  //
	headerBIn    = 20 << 10 //
	tableOfGroup = vmfs.GroupsOff + vmfs.SlabBytes
)

// objectAt is where an object's place begins.
func objectAt(slot uint32) int64 {
	return tableOfGroup + int64(slot/vmfs.ObjectsPerGroup)*gib + int64(slot%vmfs.ObjectsPerGroup)*objectBytes
}

// R1: the raise of the object table's length whose outcome a host could not learn
// must not land while another host zeroes the part. Guards the superseding in
// extendLocked.
func TestTableIsNotUsedWhileItIsZeroed(t *testing.T) {
	p := prepare(t, scenarios()[len(scenarios())-1])
	inSite(t, p.lun, func(x *site) {
		volumeUnit := block.Range{OffBytes: vmfs.VolumeUnitOff, LenBytes: 512}
		// Of the unit's compare-and-writes the second raises the length; the reads
		// before it succeed, those that ask what became of it do not.
		rules := []faultdev.Rule{{Ops: faultdev.CAW, Within: volumeUnit, Nth: 2, Effect: faultdev.Late}}
		for n := range 40 {
			rules = append(rules, faultdev.Rule{Ops: faultdev.Read, Within: volumeUnit, Nth: 4 + n, Effect: faultdev.FailBefore})
		}
		var dev *faultdev.Device
		a := x.mountThrough("a", func(d block.Device) block.Device {
			dev = faultdev.New(d, rules...)
			return dev
		})
		if err := p.run(x.t.Context(), a.Volume); err == nil || dev.Held() != 1 {
			x.t.Fatalf("extension with an unknown outcome: %v, %d commands on their way", err, dev.Held())
		}
		b := x.mount("b")
		landed := errors.New("the late command was not let land")
		zeroes := x.lun.Stats().Zeroes
		x.lun.OnChange(func(int) {
			if x.lun.Stats().Zeroes > zeroes && dev.Held() > 0 {
				landed = dev.Release(x.t.Context())
			}
		})
		if err := p.run(x.t.Context(), b.Volume); err != nil {
			x.t.Fatal(err)
		}
		x.lun.OnChange(nil)
		if !errors.Is(landed, block.ErrMiscompare) {
			x.t.Errorf("the late command landed while the table was zeroed: %v", landed)
		}
	})
}

// R2: tags change only under the object's exclusive lock.
func TestSlabsChangeOnlyUnderTheExclusiveLock(t *testing.T) {
	inSite(t, newLUN(t, 128<<20, 512), func(x *site) {
		ctx := x.t.Context()
		v := x.mount("a").Volume
		if err := newDisk(ctx, v, "/d", 1, vmfs.Ref{}); err != nil {
			x.t.Fatal(err)
		}
		info, err := v.Lookup(ctx, "/d")
		if err != nil {
			x.t.Fatal(err)
		}
		shared, err := v.Open(ctx, info.Ref, vmfs.LockShared, vmfs.NoWait)
		if err != nil {
			x.t.Fatal(err)
		}
		defer func() {
			if err := shared.Close(ctx); err != nil {
				x.t.Error(err)
			}
		}()
		view, err := v.OpenView(ctx, info.Ref)
		if err != nil {
			x.t.Fatal(err)
		}
		plan, err := v.PlanClaim(ctx, 1, false)
		if err != nil {
			x.t.Fatal(err)
		}
		for name, o := range map[string]*vmfs.Object{"shared": shared, "view": view} {
			if _, err := o.Claim(ctx, plan, false); !errors.Is(err, vmfs.ErrReadOnly) {
				x.t.Errorf("%s: claim: %v", name, err)
			}
			if err := o.Release(ctx, plan.Slabs); !errors.Is(err, vmfs.ErrReadOnly) {
				x.t.Errorf("%s: release: %v", name, err)
			}
			if err := o.PutHeader(ctx, vmfs.Header{}); !errors.Is(err, vmfs.ErrReadOnly) {
				x.t.Errorf("%s: header: %v", name, err)
			}
		}
	})
}

// R2: the UNMAP of a slab ends before its tag is cleared, or it would take another
// object's data. Guards the order in freeSlabs.
func TestSlabsAreNobodyElsesUntilTheirUnmapHasEnded(t *testing.T) {
	inSite(t, newLUN(t, 128<<20, 512), func(x *site) {
		ctx := x.t.Context()
		var dev *faultdev.Device
		a := x.mountThrough("a", func(d block.Device) block.Device {
			dev = faultdev.New(d, faultdev.Rule{Ops: faultdev.Discard, Effect: faultdev.Delay})
			return dev
		})
		if err := put(ctx, a.Volume, "/f", 40<<20, 1); err != nil {
			x.t.Fatal(err)
		}
		removed := make(chan error, 1)
		go func() { removed <- a.Remove(ctx, "/f") }()
		if err := dev.AwaitHeld(ctx, 1); err != nil {
			x.t.Fatal(err)
		}
		b := x.mount("b")
		s, err := b.Space(ctx)
		if err != nil {
			x.t.Fatal(err)
		}
		if s.UsedBytes < 40<<20 {
			x.t.Errorf("%d bytes are used while 40 MiB are being unmapped", s.UsedBytes)
		}
		if err := dev.Release(ctx); err != nil {
			x.t.Error(err)
		}
		if err := <-removed; err != nil {
			x.t.Error(err)
		}
	})
}

// R3: what a dead creator left in a slot, headers above all, is never taken for the
// next life's. Guards the new incarnation at the begin of a creation: without it
// the file would show the disk's header, which has the higher sequence.
func TestNextLifeOfASlotSharesNothingWithAHalfMadeOne(t *testing.T) {
	inSite(t, newLUN(t, 128<<20, 512), func(x *site) {
		ctx := x.t.Context()
		a := x.mount("a")
		var half vmfs.Ref
		_, err := a.Create(ctx, "/d", vmfs.New{Kind: vmfs.KindDisk, SizeBytes: 77, Init: func(ctx context.Context, o *vmfs.Object) error {
			half = o.Ref()
			h, err := o.Header(ctx)
			for i := 0; i < 5 && err == nil; i++ {
				err = o.PutHeader(ctx, *h)
			}
			a.nexus.Kill()
			return err
		}})
		if err == nil {
			x.t.Fatal("a dead host created a disk")
		}
		b := x.mount("b")
		x.breakOthers(b)
		x.leave()
		c := x.mount("c") // in a's slot, so that it looks for free object slots where a did
		if err := put(ctx, c.Volume, "/f", 100, 1); err != nil {
			x.t.Fatal(err)
		}
		info, err := c.Lookup(ctx, "/f")
		if err != nil {
			x.t.Fatal(err)
		}
		if info.Ref.Slot != half.Slot || info.Ref.Incarnation == half.Incarnation {
			x.t.Errorf("half made object %v, next object %v", half, info.Ref)
		}
		var got bytes.Buffer
		if err := c.Get(ctx, "/f", &got, nil); err != nil || !bytes.Equal(got.Bytes(), pattern(100, 1)) {
			x.t.Errorf("%d bytes read back (%v)", got.Len(), err)
		}
		x.leave()
		x.check("in the end", vmfs.Note)
	})
}

// R3: a reference to an earlier life opens nothing, in any way. Guards the check
// after the lock is taken.
func TestEarlierLifeCannotBeOpened(t *testing.T) {
	inSite(t, newLUN(t, 128<<20, 512), func(x *site) {
		ctx := x.t.Context()
		v := x.mount("a").Volume
		var old vmfs.Ref
		for i := 0; ; i++ { // until the slot comes round again
			if err := put(ctx, v, "/f", 10, 1); err != nil {
				x.t.Fatal(err)
			}
			info, err := v.Lookup(ctx, "/f")
			if err != nil {
				x.t.Fatal(err)
			}
			if i == 0 {
				old = info.Ref
			} else if info.Ref.Slot == old.Slot {
				break
			}
			if err := v.Remove(ctx, "/f"); err != nil {
				x.t.Fatal(err)
			}
		}
		for _, mode := range []vmfs.LockMode{vmfs.LockExclusive, vmfs.LockShared} {
			if _, err := v.Open(ctx, old, mode, vmfs.NoWait); !errors.Is(err, vmfs.ErrNotFound) {
				x.t.Errorf("%v: %v", mode, err)
			}
		}
		if _, err := v.OpenView(ctx, old); !errors.Is(err, vmfs.ErrNotFound) {
			x.t.Errorf("view: %v", err)
		}
		if held, err := v.LocksHeld(ctx); err != nil || len(held) != 0 {
			x.t.Errorf("locks are held: %v (%v)", held, err)
		}
	})
}

// R4: a renaming that was cut off after its first step and is run again does not
// make the name's first entry true as a twin. Guards the sweep in renameIn.
func TestRepeatedRenameLeavesOneEntry(t *testing.T) {
	for n := 1; n < 6; n++ {
		inSite(t, newLUN(t, 128<<20, 512), func(x *site) {
			ctx := x.t.Context()
			a := x.mount("a")
			if err := put(ctx, a.Volume, "/old", 10, 1); err != nil {
				x.t.Fatal(err)
			}
			a.nexus.StopAfter(n)
			_ = a.Rename(ctx, "/old", "/new")
			b := x.mount("b")
			x.breakOthers(b)
			if err := b.Rename(ctx, "/old", "/new"); err != nil && !errors.Is(err, vmfs.ErrNotFound) {
				x.t.Error(err)
			}
			root, err := b.Lookup(ctx, "/")
			if err != nil {
				x.t.Fatal(err)
			}
			list, err := b.List(ctx, root.Ref)
			if err != nil || len(list) != 1 || list[0].Name != "new" {
				x.t.Errorf("cut off after %d changes, the folder lists %v (%v)", n, list, err)
			}
			x.leave()
			x.check("in the end", vmfs.Note)
		})
	}
}

// R5: what was acknowledged is on media, whatever the target's cache loses in a
// power failure right after. Guards the flushes before headers and before LIVE, and
// FUA on headers.
func TestAcknowledgedOperationSurvivesPowerFailure(t *testing.T) {
	for _, s := range scenarios() {
		if s.sizeBytes != 0 {
			continue // its many writes are cut at points in TestCrashAfterEveryWrite
		}
		t.Run(s.name, func(t *testing.T) {
			p := prepare(t, s)
			for seed := range uint64(3) {
				inSite(t, p.lun, func(x *site) {
					a := x.mount("a")
					if err := p.run(x.t.Context(), a.Volume); err != nil {
						x.t.Fatal(err)
					}
					x.on(x.lun.CrashClone(rand.New(rand.NewPCG(seed, 2))))
					v, err := vmfs.View(x.t.Context(), x.lun.Host("view"), x.clk)
					if err != nil {
						x.t.Fatal(err)
					}
					if now := tree(x.t, x.mount("b").Volume); !maps.Equal(now, p.after) {
						x.t.Errorf("seed %d: the volume shows%s\nit should be%s", seed, describe(now), describe(p.after))
					}
					if now := used(x.t, v); now != p.usedAfter {
						x.t.Errorf("seed %d: %d bytes are used, want %d", seed, now, p.usedAfter)
					}
				})
			}
		})
	}
}

// R6: a part of the object table is zeroed before it is used, or headers of an
// earlier volume would come back to life.
func TestFreshTableKnowsNothingOfEarlierHeaders(t *testing.T) {
	p := prepare(t, scenarios()[len(scenarios())-1])
	slot := uint32(vmfs.ObjectsPerGroup)
	stale := vmfs.Header{Sequence: 99, Self: vmfs.Ref{Slot: slot, Incarnation: 1}, Kind: vmfs.KindFolder, Payload: []byte("stale"), Created: time.Unix(1, 0), Modified: time.Unix(1, 0)}
	off := objectAt(slot) + headerBIn
	b := make([]byte, vmfs.HeaderBytes)
	stale.Encode(b, testVolume, off)
	if err := p.lun.Host("past").WriteFUA(t.Context(), b, off); err != nil {
		t.Fatal(err)
	}
	inSite(t, p.lun, func(x *site) {
		a := x.mount("a")
		if err := p.run(x.t.Context(), a.Volume); err != nil {
			x.t.Fatal(err)
		}
		info, err := a.Lookup(x.t.Context(), "/new")
		if err != nil || info.Ref != stale.Self {
			x.t.Fatalf("the new folder is object %v (%v)", info.Ref, err)
		}
		if list, err := a.List(x.t.Context(), info.Ref); err != nil || len(list) != 0 {
			x.t.Errorf("the new folder lists %v (%v)", list, err)
		}
	})
}

// R6: on a full volume names can still be made, and everything can be removed.
func TestFullVolumeCanBeEmptied(t *testing.T) {
	inSite(t, newLUN(t, 96<<20, 512), func(x *site) {
		ctx := x.t.Context()
		v := x.mount("a").Volume
		files := 0
		for ; ; files++ {
			err := put(ctx, v, fmt.Sprintf("/f%d", files), 5<<20, 1)
			if errors.Is(err, vmfs.ErrNoSpace) {
				break
			}
			if err != nil {
				x.t.Fatal(err)
			}
		}
		s, err := v.Space(ctx)
		if err != nil || s.FreeBytes < s.ReserveBytes || s.FreeBytes > s.ReserveBytes+5<<20 {
			x.t.Errorf("full with %+v (%v)", s, err)
		}
		for i := range inlineNames + 10 { // the root folder outgrows its header
			if err := v.Mkdir(ctx, "/"+long(i)); err != nil {
				x.t.Fatalf("folder %d: %v", i, err)
			}
		}
		for i := range files {
			if err := v.Remove(ctx, fmt.Sprintf("/f%d", i)); err != nil {
				x.t.Error(err)
			}
		}
		if err := put(ctx, v, "/again", 20<<20, 2); err != nil {
			x.t.Error(err)
		}
		x.leave()
		x.check("in the end", vmfs.Note)
	})
}

// R8: a host that was rebooted takes its own old locks without a window, as its
// death is proven, and its old generation can write no more.
func TestRebootedHostTakesItsOwnLocks(t *testing.T) {
	inSite(t, newLUN(t, 128<<20, 512), func(x *site) {
		ctx := x.t.Context()
		a := x.mount("a")
		if err := newDisk(ctx, a.Volume, "/d", 1, vmfs.Ref{}); err != nil {
			x.t.Fatal(err)
		}
		info, err := a.Lookup(ctx, "/d")
		if err != nil {
			x.t.Fatal(err)
		}
		o, err := a.Open(ctx, info.Ref, vmfs.LockExclusive, vmfs.NoWait)
		if err != nil {
			x.t.Fatal(err)
		}
		a.nexus.Kill()
		again := x.mount("a")
		before := x.clk.Now()
		o2, err := again.Open(ctx, info.Ref, vmfs.LockExclusive, vmfs.NoWait)
		if err != nil {
			x.t.Fatal(err)
		}
		if waited := x.clk.Now().Sub(before); waited >= siteLease/2 {
			x.t.Errorf("it waited %v for itself", waited)
		}
		if o2.LockGeneration() <= o.LockGeneration() || o2.PreviousHolder().Owner.Generation == 0 {
			x.t.Errorf("lock generation %d after %d, taken from %+v", o2.LockGeneration(), o.LockGeneration(), o2.PreviousHolder().Owner)
		}
		if err := o2.Close(ctx); err != nil {
			x.t.Error(err)
		}
	})
}

// R17: two clones of one snapshot made at once by one host both count. Guards the
// exclusion in reference: without it the second takes the first one's pending change
// for a leftover, and the snapshot could be deleted under the first.
func TestClonesMadeAtOnceBothCount(t *testing.T) {
	inSite(t, newLUN(t, 128<<20, 512), func(x *site) {
		ctx := x.t.Context()
		// Every change of a free slot's identity waits a while.
		var dev *faultdev.Device
		table := block.Range{OffBytes: objectAt(6), LenBytes: 200 * objectBytes}
		a := x.mountThrough("a", func(d block.Device) block.Device {
			dev = faultdev.New(d, faultdev.Rule{Ops: faultdev.CAW, Within: table, Nth: 2, Effect: faultdev.Delay})
			return dev
		})
		for _, err := range []error{
			a.Mkdir(ctx, "/e"), newDisk(ctx, a.Volume, "/d", 1, vmfs.Ref{}), publish(ctx, a.Volume, "/d"), a.Mkdir(ctx, "/g"),
		} {
			if err != nil {
				x.t.Fatal(err)
			}
		}
		first := make(chan error, 1)
		go func() { first <- clone(ctx, a.Volume, "/d", "/e/c1") }()
		if err := dev.AwaitHeld(ctx, 1); err != nil {
			x.t.Fatal(err)
		}
		second := make(chan error, 1)
		go func() { second <- clone(ctx, a.Volume, "/d", "/g/c2") }()
		if err := a.Session().Device().Flush(ctx); err != nil {
			x.t.Error(err)
		}
		waitFor(x, 100*time.Millisecond)
		if err := dev.Release(ctx); err != nil {
			x.t.Error(err)
		}
		for _, c := range []chan error{first, second} {
			if err := <-c; err != nil {
				x.t.Error(err)
			}
		}
		if len(dev.Injections()) != 1 {
			x.t.Errorf("%d changes were held up", len(dev.Injections()))
		}
		if err := unpublish(ctx, a.Volume, "/d"); !errors.Is(err, vmfs.ErrInUse) {
			x.t.Errorf("unpublishing the origin of two clones: %v", err)
		}
		for i, path := range []string{"/e/c1", "/g/c2"} {
			if err := a.Remove(ctx, path); err != nil {
				x.t.Error(err)
			}
			if i > 0 {
				break
			}
			if err := unpublish(ctx, a.Volume, "/d"); !errors.Is(err, vmfs.ErrInUse) {
				x.t.Errorf("unpublishing the origin of the clone that is left: %v", err)
			}
		}
		if err := unpublish(ctx, a.Volume, "/d"); err != nil {
			x.t.Error(err)
		}
		x.leave()
		x.check("in the end", vmfs.Note)
	})
}

// waitFor lets d pass on the site's clock.
func waitFor(x *site, d time.Duration) {
	timer := x.clk.NewTimer(d)
	defer timer.Stop()
	<-timer.C
}

// A header write that the device acknowledged and lost costs no other name than
// the one it was about: the blocks that the other copy refers to, and those written
// since, are not written over. Guards the choice in freeBlocks.
func TestLostHeaderWriteKeepsTheOtherNames(t *testing.T) {
	p := prepare(t, scenario{name: "rename", done: vmfs.ErrNotFound,
		setup: func(ctx context.Context, v *vmfs.Volume) error {
			for i := range inlineNames + 20 {
				if err := v.Mkdir(ctx, "/"+long(i)); err != nil {
					return err
				}
			}
			return nil
		},
		run: func(ctx context.Context, v *vmfs.Volume) error { return v.Rename(ctx, "/"+long(3), "/"+long(900)) },
	})
	for nth := 1; nth <= 2; nth++ {
		inSite(t, p.lun, func(x *site) {
			root := block.Range{OffBytes: objectAt(1) + headerAIn, LenBytes: 2 * vmfs.HeaderBytes}
			var dev *faultdev.Device
			a := x.mountThrough("a", func(d block.Device) block.Device {
				dev = faultdev.New(d, faultdev.Rule{Ops: faultdev.FUA, Within: root, Nth: nth, Effect: faultdev.Lost})
				return dev
			})
			if err := p.run(x.t.Context(), a.Volume); err != nil {
				x.t.Error(err)
			}
			if len(dev.Injections()) != 1 {
				x.t.Errorf("%d header writes were lost", len(dev.Injections()))
			}
			now := tree(x.t, a.Volume)
			for path := range p.before {
				if path != long(3) && now[path] != p.before[path] {
					x.t.Errorf("header write %d lost: /%s is %q, was %q", nth, path, now[path], p.before[path])
				}
			}
		})
	}
}

// The older header copy stays readable, with the blocks that it refers to, until it
// is replaced itself: a newest copy that turns out unreadable costs one change.
// Guards the second copy's share in freeBlocks.
func TestOlderHeaderCopyStaysReadable(t *testing.T) {
	p := prepare(t, scenario{name: "mkdir", done: vmfs.ErrExists,
		setup: func(ctx context.Context, v *vmfs.Volume) error {
			for i := range inlineNames + 20 {
				if err := v.Mkdir(ctx, "/"+long(i)); err != nil {
					return err
				}
			}
			return nil
		},
		run: func(ctx context.Context, v *vmfs.Volume) error { return v.Mkdir(ctx, "/"+long(900)) },
	})
	for n := range p.changes {
		inSite(t, p.lun, func(x *site) {
			a := x.mount("a")
			a.nexus.StopAfter(n)
			_ = p.run(x.t.Context(), a.Volume)
			var sequence [2]uint64
			dev := x.lun.Host("vandal")
			at := [2]int64{objectAt(1) + headerAIn, objectAt(1) + headerBIn}
			b := make([]byte, vmfs.HeaderBytes)
			for i, off := range at {
				if err := dev.ReadAt(x.t.Context(), b, off); err != nil {
					x.t.Fatal(err)
				}
				h, err := vmfs.DecodeHeader(b, testVolume, off)
				if err != nil {
					x.t.Fatal(err)
				}
				sequence[i] = h.Sequence
			}
			newest := at[0]
			if sequence[1] > sequence[0] {
				newest = at[1]
			}
			clear(b)
			overwrite(x.t, x.lun, newest, b)
			v, err := vmfs.View(x.t.Context(), x.lun.Host("view"), x.clk)
			if err != nil {
				x.t.Fatal(err)
			}
			now := tree(x.t, v)
			for i := range inlineNames + 19 { // the newest change may have been the last name
				if now[long(i)] == "" {
					x.t.Fatalf("after %d changes, the older copy shows %d names, without /%s", n, len(now), long(i))
				}
			}
		})
	}
}

// After a header write that failed, nobody can tell which copy is the older one: the
// handle writes no more, and the next opening goes on from what is on media.
func TestFailedHeaderWriteEndsTheHandle(t *testing.T) {
	inSite(t, newLUN(t, 128<<20, 512), func(x *site) {
		ctx := x.t.Context()
		headers := block.Range{OffBytes: objectAt(2) + headerAIn, LenBytes: 2 * vmfs.HeaderBytes}
		a := x.mountThrough("a", func(d block.Device) block.Device {
			return faultdev.New(d, faultdev.Rule{Ops: faultdev.FUA, Within: headers, Nth: 4, Effect: faultdev.FailAfter})
		})
		if err := newDisk(ctx, a.Volume, "/d", 1, vmfs.Ref{}); err != nil { // three header writes
			x.t.Fatal(err)
		}
		err := withDisk(ctx, a.Volume, "/d", func(o *vmfs.Object, _ testDisk) error {
			for range 2 {
				if err := setPublished(ctx, o, vmfs.Ref{}); !errors.Is(err, faultdev.ErrInjected) {
					x.t.Errorf("header write: %v", err)
				}
			}
			return nil
		})
		if err != nil {
			x.t.Fatal(err)
		}
		if err := withDisk(ctx, a.Volume, "/d", func(o *vmfs.Object, _ testDisk) error {
			return setPublished(ctx, o, vmfs.Ref{})
		}); err != nil {
			x.t.Errorf("after another opening: %v", err)
		}
	})
}
