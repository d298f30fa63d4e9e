package datastore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"testing"
	"time"

	"basalt/block"
	"basalt/block/simdev"
	"basalt/datastore"
	"basalt/internal/clock"
	"basalt/lease"
	"basalt/thinprov"
	"basalt/vmfs"
)

const (
	mib = 1 << 20
	// testLease is short, so that a host whose death nothing proves is soon found out.
	testLease = 400 * time.Millisecond
)

func newLUN(t *testing.T, logical int) *simdev.LUN { return newLUNOfLease(t, logical, testLease) }

func newLUNOfLease(t *testing.T, logical int, term time.Duration) *simdev.LUN {
	t.Helper()
	lun := simdev.New(simdev.Options{SizeBytes: 1 << 30, LogicalBytes: logical, Seed: 1})
	dev := lun.Host("mkfs")
	if err := vmfs.Format(t.Context(), dev, clock.System{}, vmfs.FormatOptions{Volume: [16]byte{1}, Lease: term}); err != nil {
		t.Fatal(err)
	}
	return lun
}

// mount joins the LUN as a host; the handle lets a test kill it.
func mount(t *testing.T, lun *simdev.LUN, name string) (*datastore.Datastore, *simdev.Handle) {
	t.Helper()
	h := lun.Host(name)
	ds, err := datastore.Mount(t.Context(), h, h, clock.System{}, slog.New(slog.DiscardHandler), datastore.Options{HostName: name, HostID: [16]byte{1}})
	if err != nil {
		t.Fatal(err)
	}
	return ds, h
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pattern is n bytes that tell which write they are of.
func pattern(seed uint64, n int) []byte {
	b := block.AlignedBuffer(n)
	rng := rand.New(rand.NewPCG(seed, 1))
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func wantBytes(t *testing.T, what string, r interface {
	ReadAt(ctx context.Context, p []byte, off int64) error
}, off int64, want []byte) {
	t.Helper()
	got := block.AlignedBuffer(len(want))
	must(t, r.ReadAt(t.Context(), got, off))
	if !bytes.Equal(got, want) {
		t.Errorf("%s: %d bytes at %d differ from what was written", what, len(want), off)
	}
}

// wantSound checks the whole volume on a view and fails on anything above the
// allowed severity.
func wantSound(t *testing.T, lun *simdev.LUN, allowed vmfs.Severity, when string) {
	t.Helper()
	ds, err := datastore.View(t.Context(), lun.Host("check"), clock.System{})
	must(t, err)
	r, err := ds.Check(t.Context())
	must(t, err)
	for _, f := range r.Findings {
		if f.Severity > allowed {
			t.Errorf("%s: check: %v: %s: %s", when, f.Severity, f.Where, f.What)
		}
	}
}

func TestAnotherHostTakesOverWithNothingLost(t *testing.T) {
	lun := newLUN(t, 512)
	a, dying := mount(t, lun, "a")
	must(t, a.CreateDisk(t.Context(), "/d0", 64*mib))
	k, err := a.OpenDisk(t.Context(), "/d0")
	must(t, err)
	want := map[int64][]byte{}
	for i := range int64(50) {
		off := i * 37 % 64 * mib / 2
		b := pattern(uint64(i), 8192)
		must(t, k.WriteAt(t.Context(), b, off))
		want[off] = b
	}
	b, _ := mount(t, lun, "b")
	if _, err := b.OpenDisk(t.Context(), "/d0"); !errors.Is(err, vmfs.ErrHeld) {
		t.Fatalf("a disk that a live host has open was opened: %v", err)
	}
	for _, rename := range []*datastore.Datastore{a, b} {
		if err := rename.Rename(t.Context(), "/d0", "/d1"); !errors.Is(err, vmfs.ErrHeld) {
			t.Errorf("a disk that is in use was renamed: %v", err)
		}
	}
	if err := a.RemoveDisk(t.Context(), "/d0"); !errors.Is(err, datastore.ErrDiskOpen) {
		t.Errorf("a disk that is in use was removed: %v", err)
	}
	dying.Kill()
	k2, err := b.OpenDisk(t.Context(), "/d0")
	must(t, err)
	for off, w := range want {
		wantBytes(t, "after the takeover", k2, off, w)
	}
	must(t, k2.Close(t.Context()))
	must(t, b.Close(t.Context()))
	wantSound(t, lun, vmfs.Note, "after the takeover")
}

// What needs no device operation is not answered either by a host whose disk
// another one has taken over.
func TestNothingIsAnsweredAfterATakeover(t *testing.T) {
	lun := newLUN(t, 512)
	a, frozen := mount(t, lun, "a")
	must(t, a.CreateDisk(t.Context(), "/d0", 64*mib))
	k, err := a.OpenDisk(t.Context(), "/d0")
	must(t, err)
	frozen.Freeze()
	b, _ := mount(t, lun, "b")
	k2, err := b.OpenDisk(t.Context(), "/d0")
	must(t, err)
	must(t, k2.WriteAt(t.Context(), pattern(1, 4096), 8*mib))

	answers := map[string]func(context.Context) error{
		"a hole's zeros": func(ctx context.Context) error { return k.ReadAt(ctx, make([]byte, 4096), 8*mib) },
		"block status": func(ctx context.Context) error {
			return k.Map(ctx, 8*mib, 4096, func(thinprov.Run) bool { return true })
		},
		"a discard of nothing": func(ctx context.Context) error { return k.Discard(ctx, 16*mib, mib) },
		"a flush of nothing":   k.Flush,
	}
	for what, ask := range answers {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		if err := ask(ctx); err == nil {
			t.Errorf("%s was answered by a host that has lost the disk", what)
		}
		cancel()
	}
	frozen.Thaw()
	<-a.Volume().Session().Lost()
	for what, ask := range answers {
		if err := ask(t.Context()); !errors.Is(err, lease.ErrLost) {
			t.Errorf("%s after the loss: %v", what, err)
		}
	}
	must(t, k2.Close(t.Context()))
	must(t, b.Close(t.Context()))
}

func TestClonesAndSnapshotsLiveAndEndAcrossHosts(t *testing.T) {
	lun := newLUN(t, 4096)
	a, _ := mount(t, lun, "a")
	b, _ := mount(t, lun, "b")
	must(t, a.CreateDisk(t.Context(), "/base", 64*mib))
	k, err := a.OpenDisk(t.Context(), "/base")
	must(t, err)
	old := pattern(1, mib)
	must(t, k.WriteAt(t.Context(), old, 5*mib))
	must(t, a.CreateSnapshot(t.Context(), "/base", "s1"))
	must(t, a.Clone(t.Context(), "/base", "s1", "/c1"))
	newer := pattern(2, mib)
	must(t, k.WriteAt(t.Context(), newer, 5*mib))

	// The snapshot is published: another host clones it while the first holds the disk.
	must(t, b.Clone(t.Context(), "/base", "s1", "/c2"))
	for i, path := range []string{"/c1", "/c2"} {
		c, err := b.OpenDisk(t.Context(), path)
		must(t, err)
		wantBytes(t, path, c, 5*mib, old)
		own := pattern(uint64(10+i), 4096)
		must(t, c.WriteAt(t.Context(), own, 5*mib+8192))
		wantBytes(t, path, c, 5*mib+8192, own)
		wantBytes(t, path, c, 5*mib+12288, old[12288:])
		must(t, c.Close(t.Context()))
	}
	wantBytes(t, "the origin", k, 5*mib, newer)
	s, err := a.OpenSnapshot(t.Context(), "/base", "s1")
	must(t, err)
	wantBytes(t, "the snapshot", s, 5*mib, old)
	must(t, s.Close(t.Context()))

	if err := a.RemoveSnapshot(t.Context(), "/base", "s1"); !errors.Is(err, vmfs.ErrInUse) {
		t.Errorf("a snapshot with clones was removed: %v", err)
	}
	must(t, k.Close(t.Context()))
	if err := a.RemoveDisk(t.Context(), "/base"); !errors.Is(err, vmfs.ErrInUse) {
		t.Errorf("a disk whose snapshot has clones was removed: %v", err)
	}
	must(t, b.RemoveDisk(t.Context(), "/c1"))
	must(t, a.RemoveDisk(t.Context(), "/c2"))
	must(t, b.RemoveSnapshot(t.Context(), "/base", "s1"))
	must(t, b.RemoveDisk(t.Context(), "/base"))
	sp, err := a.Volume().Space(t.Context())
	if err != nil || sp.UsedBytes != 0 {
		t.Errorf("%d bytes are used after everything was removed (%v)", sp.UsedBytes, err)
	}
	must(t, a.Close(t.Context()))
	must(t, b.Close(t.Context()))
	wantSound(t, lun, vmfs.Note, "at the end")
}

// TestCrashAtEveryWriteOf kills the host after each of its writes, with and
// without a power failure of the LUN, and has another host go on (R17, R2, R4).
func TestCrashAtEveryWriteOf(t *testing.T) {
	base := newLUN(t, 512)
	a, _ := mount(t, base, "prepare")
	must(t, a.CreateDisk(t.Context(), "/base", 16*mib))
	k, err := a.OpenDisk(t.Context(), "/base")
	must(t, err)
	data := pattern(3, 64<<10)
	must(t, k.WriteAt(t.Context(), data, mib))
	must(t, a.CreateSnapshot(t.Context(), "/base", "s1"))
	must(t, k.Close(t.Context()))
	must(t, a.Clone(t.Context(), "/base", "s1", "/c0"))
	must(t, a.CreateSnapshot(t.Context(), "/base", "s2"))
	must(t, a.Close(t.Context()))

	type step struct {
		run     func(ds *datastore.Datastore) error
		already error // what a second run says when the first one took effect; nil: it works again
	}
	clone := func(snapshot string) func(*datastore.Datastore) error {
		return func(ds *datastore.Datastore) error {
			if err := ds.Clone(t.Context(), "/base", snapshot, "/c1"); err != nil {
				return err
			}
			k, err := ds.OpenDisk(t.Context(), "/c1")
			if err != nil {
				return err
			}
			got := block.AlignedBuffer(len(data))
			err = k.ReadAt(t.Context(), got, mib)
			if err == nil && !bytes.Equal(got, data) {
				t.Error("the clone's content is not its origin's")
			}
			return errors.Join(err, k.Close(t.Context()))
		}
	}
	steps := map[string]step{
		"create":     {func(ds *datastore.Datastore) error { return ds.CreateDisk(t.Context(), "/new", 8*mib) }, vmfs.ErrExists},
		"clone":      {clone("s2"), vmfs.ErrExists},
		"clone2":     {clone("s1"), vmfs.ErrExists},
		"rm clone":   {func(ds *datastore.Datastore) error { return ds.RemoveDisk(t.Context(), "/c0") }, vmfs.ErrNotFound},
		"rename":     {func(ds *datastore.Datastore) error { return ds.Rename(t.Context(), "/c0", "/c1") }, vmfs.ErrNotFound},
		"snapshot":   {func(ds *datastore.Datastore) error { return ds.CreateSnapshot(t.Context(), "/base", "s3") }, thinprov.ErrExists},
		"rm snap":    {func(ds *datastore.Datastore) error { return ds.RemoveSnapshot(t.Context(), "/base", "s2") }, datastore.ErrNoSnapshot},
		"first data": {func(ds *datastore.Datastore) error { return writeTo(t, ds, "/c0", 3*mib, 4096) }, nil},
	}
	for name, step := range steps {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for n := 0; ; n++ {
				lun := base.Clone()
				ds, h := mount(t, lun, "dies")
				h.StopAfter(n)
				err := step.run(ds)
				h.Kill()
				if err == nil {
					if n < 5 {
						t.Fatalf("the step makes only %d changes", n)
					}
					return
				}
				if n%2 == 1 {
					lun = lun.CrashClone(rand.New(rand.NewPCG(uint64(n), 7)))
				}
				goOn(t, lun, fmt.Sprintf("%s, crash after write %d", name, n), data, step.run, step.already)
				if t.Failed() {
					return
				}
			}
		})
	}
}

// goOn goes on after a crash: another host reads what was there, does the step
// again, ends everything, and the volume is sound and empty.
func goOn(t *testing.T, lun *simdev.LUN, when string, data []byte, step func(*datastore.Datastore) error, already error) {
	t.Helper()
	wantSound(t, lun, vmfs.Leak, when)
	ds, _ := mount(t, lun, "next")
	k, err := ds.OpenDisk(t.Context(), "/base")
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	wantBytes(t, when, k, mib, data)
	must(t, k.Close(t.Context()))
	if err := step(ds); err != nil && (already == nil || !errors.Is(err, already)) {
		t.Errorf("%s: the step does not work afterwards: %v", when, err)
	}
	for _, path := range []string{"/c0", "/c1", "/new", "/base"} {
		if err := ds.RemoveDisk(t.Context(), path); err != nil && !errors.Is(err, vmfs.ErrNotFound) {
			t.Errorf("%s: remove %s: %v", when, path, err)
		}
	}
	must(t, ds.Close(t.Context()))
	wantSound(t, lun, vmfs.Leak, when+", everything removed")
}

func writeTo(t *testing.T, ds *datastore.Datastore, path string, off int64, n int) error {
	k, err := ds.OpenDisk(t.Context(), path)
	if err != nil {
		return err
	}
	return errors.Join(k.WriteAt(t.Context(), pattern(9, n), off), k.Close(t.Context()))
}

// TestSteadyStateCostsOneDeviceOperation counts what reaches the LUN, heartbeats
// apart.
func TestSteadyStateCostsOneDeviceOperation(t *testing.T) {
	lun := newLUNOfLease(t, 512, 2*time.Minute) // few heartbeats
	ds, h := mount(t, lun, "a")
	must(t, ds.CreateDisk(t.Context(), "/d", 64*mib))
	k, err := ds.OpenDisk(t.Context(), "/d")
	must(t, err)
	must(t, k.WriteAt(t.Context(), pattern(1, 4*mib), 0))
	count := func(f func()) simdev.Stats {
		before := h.Stats()
		f()
		after := h.Stats()
		return simdev.Stats{Reads: after.Reads - before.Reads, Writes: after.Writes - before.Writes, FUAs: after.FUAs - before.FUAs,
			Flushes: after.Flushes - before.Flushes, CAWs: after.CAWs - before.CAWs}
	}
	const n = 200
	// A heartbeat is a write and a read; allow for a few.
	const beats = 3
	small := pattern(2, 4096)
	s := count(func() {
		for i := range int64(n) {
			must(t, k.WriteAt(t.Context(), small, i*8192))
		}
	})
	if s.Writes < n || s.Writes > n+beats || s.FUAs+s.Flushes+s.CAWs != 0 || s.Reads > beats {
		t.Errorf("%d overwrites cost %+v", n, s)
	}
	big := block.AlignedBuffer(mib)
	s = count(func() {
		for i := range int64(n) {
			must(t, k.ReadAt(t.Context(), big, i%3*mib))
		}
	})
	if s.Reads < n || s.Reads > n+beats || s.Writes > beats || s.FUAs+s.Flushes+s.CAWs != 0 {
		t.Errorf("%d contiguous reads cost %+v", n, s)
	}
	must(t, k.Close(t.Context()))
	must(t, ds.Close(t.Context()))
}

func TestDeletionThatACrashCutOffIsFinishedByTheNextOpener(t *testing.T) {
	base := newLUN(t, 512)
	a, _ := mount(t, base, "prepare")
	must(t, a.CreateDisk(t.Context(), "/d", 512*mib))
	k, err := a.OpenDisk(t.Context(), "/d")
	must(t, err)
	// Scattered blocks make many extents, so that a deletion takes several steps.
	scatter := func(seed uint64) {
		for i := range int64(3000) {
			must(t, k.WriteAt(t.Context(), pattern(seed, 512), i*160<<10))
		}
	}
	scatter(1)
	must(t, a.CreateSnapshot(t.Context(), "/d", "s1"))
	scatter(2)
	must(t, a.CreateSnapshot(t.Context(), "/d", "s2"))
	must(t, k.Close(t.Context()))
	must(t, a.Close(t.Context()))

	cutOff := 0
	for n := 0; ; n++ {
		lun := base.Clone()
		ds, h := mount(t, lun, "dies")
		h.StopAfter(n)
		err := ds.RemoveSnapshot(t.Context(), "/d", "s1")
		h.Kill()
		if err == nil {
			break
		}
		next, _ := mount(t, lun, "next")
		info, err := next.Info(t.Context(), "/d")
		must(t, err)
		if len(info.Snapshots) == 2 {
			cutOff++
		}
		must(t, next.RemoveSnapshot(t.Context(), "/d", "s2"))
		if err := next.RemoveSnapshot(t.Context(), "/d", "s1"); err != nil && !errors.Is(err, datastore.ErrNoSnapshot) {
			t.Fatalf("crash after write %d: %v", n, err)
		}
		k, err := next.OpenDisk(t.Context(), "/d")
		must(t, err)
		wantBytes(t, fmt.Sprintf("crash after write %d", n), k, 160<<10, pattern(2, 512))
		must(t, k.Close(t.Context()))
		must(t, next.Close(t.Context()))
		wantSound(t, lun, vmfs.Note, fmt.Sprintf("crash after write %d", n))
	}
	if cutOff < 3 {
		t.Errorf("only %d crashes came in the middle of the deletion", cutOff)
	}
}

// A clone that is made while its snapshot is being removed either comes about, and
// then has the snapshot's content for good, or does not.
func TestCloneAgainstRemovalOfItsSnapshot(t *testing.T) {
	lun := newLUNOfLease(t, 512, time.Minute)
	ds, _ := mount(t, lun, "a")
	must(t, ds.CreateDisk(t.Context(), "/d", 16*mib))
	k, err := ds.OpenDisk(t.Context(), "/d")
	must(t, err)
	for round := range uint64(40) {
		want := pattern(2*round, 64<<10)
		must(t, k.WriteAt(t.Context(), want, 0))
		must(t, ds.CreateSnapshot(t.Context(), "/d", "s"))
		must(t, ds.Clone(t.Context(), "/d", "s", "/published"))
		must(t, ds.RemoveDisk(t.Context(), "/published"))
		must(t, k.WriteAt(t.Context(), pattern(2*round+1, 64<<10), 0)) // the head leaves the snapshot's blocks

		start := make(chan struct{})
		cloned, removed := make(chan error, 1), make(chan error, 1)
		go func() { <-start; cloned <- ds.Clone(t.Context(), "/d", "s", "/c") }()
		go func() { <-start; removed <- ds.RemoveSnapshot(t.Context(), "/d", "s") }()
		close(start)
		cloneErr, removeErr := <-cloned, <-removed
		must(t, k.WriteAt(t.Context(), pattern(999, 4*mib), 4*mib)) // may take what was freed
		if cloneErr == nil {
			if removeErr == nil {
				t.Errorf("round %d: the snapshot was removed from under its clone", round)
			}
			c, err := ds.OpenDisk(t.Context(), "/c")
			must(t, err)
			wantBytes(t, fmt.Sprintf("round %d, the clone", round), c, 0, want)
			must(t, c.Close(t.Context()))
			must(t, ds.RemoveDisk(t.Context(), "/c"))
		}
		if removeErr != nil {
			must(t, ds.RemoveSnapshot(t.Context(), "/d", "s"))
		}
		must(t, k.Discard(t.Context(), 4*mib, 4*mib))
	}
	must(t, k.Close(t.Context()))
	must(t, ds.Close(t.Context()))
	wantSound(t, lun, vmfs.Note, "after all rounds")
}

// TestSnapshotAndCloneCostDoesNotGrow counts what reaches the LUN, for disks of
// little and of much content.
func TestSnapshotAndCloneCostDoesNotGrow(t *testing.T) {
	const beats = 3 // a heartbeat may fall into each count
	changes := func(s simdev.Stats) int64 { return s.Writes + s.FUAs + s.Flushes + s.CAWs + s.Zeroes + s.Discards }
	var snapshots, clones []int64
	for _, mapped := range []int64{1 * mib, 128 * mib} {
		lun := newLUNOfLease(t, 512, 2*time.Minute)
		ds, h := mount(t, lun, "a")
		must(t, ds.CreateDisk(t.Context(), "/d", 256*mib))
		k, err := ds.OpenDisk(t.Context(), "/d")
		must(t, err)
		for off := int64(0); off < mapped; off += mib {
			must(t, k.WriteAt(t.Context(), pattern(1, mib), off))
		}
		before := h.Stats()
		must(t, ds.CreateSnapshot(t.Context(), "/d", "s"))
		after := h.Stats()
		snapshots = append(snapshots, changes(after)-changes(before))

		before = after
		must(t, k.WriteAt(t.Context(), pattern(2, 4096), 8192))
		after = h.Stats()
		if n := after.WrittenBytes - before.WrittenBytes; n > 2*4096+beats*4096 {
			t.Errorf("%d MiB mapped: 4 KiB after a snapshot wrote %d bytes", mapped/mib, n)
		}
		must(t, ds.Clone(t.Context(), "/d", "s", "/published"))
		before = h.Stats()
		must(t, ds.Clone(t.Context(), "/d", "s", "/c"))
		clones = append(clones, changes(h.Stats())-changes(before))
		must(t, k.Close(t.Context()))
		must(t, ds.Close(t.Context()))
	}
	for what, n := range map[string][]int64{"snapshot": snapshots, "clone": clones} {
		if d := n[1] - n[0]; d > beats || d < -beats {
			t.Errorf("a %s of little costs %d changes, of 128 times as much %d", what, n[0], n[1])
		}
		t.Logf("%s: %d and %d changes", what, n[0], n[1])
	}
}
