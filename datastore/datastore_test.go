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

	steps := map[string]func(ds *datastore.Datastore) error{
		"create":     func(ds *datastore.Datastore) error { return ds.CreateDisk(t.Context(), "/new", 8*mib) },
		"clone":      func(ds *datastore.Datastore) error { return ds.Clone(t.Context(), "/base", "s2", "/c1") },
		"clone2":     func(ds *datastore.Datastore) error { return ds.Clone(t.Context(), "/base", "s1", "/c1") },
		"rm clone":   func(ds *datastore.Datastore) error { return ds.RemoveDisk(t.Context(), "/c0") },
		"snapshot":   func(ds *datastore.Datastore) error { return ds.CreateSnapshot(t.Context(), "/base", "s3") },
		"rm snap":    func(ds *datastore.Datastore) error { return ds.RemoveSnapshot(t.Context(), "/base", "s2") },
		"first data": func(ds *datastore.Datastore) error { return writeTo(t, ds, "/c0", 3*mib, 4096) },
	}
	for name, step := range steps {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for n := 0; ; n++ {
				lun := base.Clone()
				ds, h := mount(t, lun, "dies")
				h.StopAfter(n)
				err := step(ds)
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
				recover1(t, lun, fmt.Sprintf("%s, crash after write %d", name, n), data, step)
				if t.Failed() {
					return
				}
			}
		})
	}
}

// recover1 goes on after a crash: another host reads what was there, does the step
// again, ends everything, and the volume is sound and empty.
func recover1(t *testing.T, lun *simdev.LUN, when string, data []byte, step func(*datastore.Datastore) error) {
	t.Helper()
	wantSound(t, lun, vmfs.Leak, when)
	ds, _ := mount(t, lun, "next")
	k, err := ds.OpenDisk(t.Context(), "/base")
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	wantBytes(t, when, k, mib, data)
	must(t, k.Close(t.Context()))
	err = step(ds)
	for _, fine := range []error{vmfs.ErrExists, vmfs.ErrNotFound, datastore.ErrNoSnap, thinprov.ErrExists} {
		if errors.Is(err, fine) {
			err = nil
		}
	}
	if err != nil {
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
		if err := next.RemoveSnapshot(t.Context(), "/d", "s1"); err != nil && !errors.Is(err, datastore.ErrNoSnap) {
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
