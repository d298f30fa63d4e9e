package thinprov_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"basalt/internal/clock"
	"basalt/thinprov"
)

// scenario is a short life of a disk with every kind of change. It returns what it
// wrote and flushed, by offset, and stops at the first error.
type scenario struct {
	d       *thinprov.Disk
	v       *volume
	flushed []byte // content that must survive
	unsure  []bool // blocks that a write may have changed since
	snapped []byte // content of snapshot 1 once it exists
	deleted bool   // snapshot 1 is being deleted, or is
	err     error
}

const scenarioSize = 3 << 20

func (s *scenario) do(err error) bool {
	if s.err == nil {
		s.err = err
	}
	return s.err == nil
}

func (s *scenario) write(off int64, p []byte) bool {
	for b := off / page; b <= (off+int64(len(p))-1)/page; b++ {
		s.unsure[b] = true
	}
	return s.do(s.d.WriteAt(context.Background(), p, off)) && s.keep(off, p)
}

// keep flushes, and notes that p must be there from now on.
func (s *scenario) keep(off int64, p []byte) bool {
	if !s.do(s.d.Flush(context.Background())) {
		return false
	}
	copy(s.flushed[off:], p)
	for b := off / page; b <= (off+int64(len(p))-1)/page; b++ {
		s.unsure[b] = false
	}
	return true
}

func (s *scenario) discard(off, n int64) bool {
	for b := off / page; b < (off+n)/page; b++ {
		s.unsure[b] = true
	}
	return s.do(s.d.Discard(context.Background(), off, n)) && s.keep(off, make([]byte, n))
}

func (s *scenario) run() {
	ctx := context.Background()
	_ = s.write(0, pattern(1, 300<<10)) &&
		s.write(64<<10, pattern(2, 8192)) &&
		s.write(1<<20+512, pattern(3, 1024)) &&
		s.snapshot() &&
		s.write(4096, pattern(4, 64<<10)) &&
		s.do(s.d.Checkpoint(ctx)) &&
		s.write(1<<20, pattern(5, 512<<10)) &&
		s.discard(128<<10, 128<<10) &&
		s.do(s.d.Checkpoint(ctx)) &&
		s.delete() &&
		s.write(2<<20, pattern(6, 4096)) &&
		s.discard(0, 1<<20) && // whole slabs become empty and go back
		s.discard(1<<20, 1<<20) &&
		s.do(s.d.Checkpoint(ctx)) &&
		s.do(s.d.Checkpoint(ctx)) &&
		s.write(0, pattern(7, 1<<20)) &&
		s.do(s.d.Close(ctx))
}

func (s *scenario) snapshot() bool {
	content := append([]byte{}, s.flushed...)
	if _, err := s.d.Snapshot(context.Background(), "one", [16]byte{1}); err != nil {
		return s.do(err)
	}
	s.snapped = content
	return true
}

func (s *scenario) delete() bool {
	s.deleted = true
	return s.do(s.d.DeleteSnapshot(context.Background(), [16]byte{1}))
}

// verify opens the disk again and compares.
func (s *scenario) verify(t *testing.T, r *rig) {
	t.Helper()
	got := make([]byte, scenarioSize)
	if err := r.ReadAt(t.Context(), got, 0); err != nil {
		t.Fatal(err)
	}
	for b, unsure := range s.unsure {
		if i := firstDiff(got[b*page:(b+1)*page], s.flushed[b*page:(b+1)*page]); i >= 0 && !unsure {
			t.Fatalf("byte %d is not what was flushed", b*page+i)
		}
	}
	view, err := r.View(t.Context(), [16]byte{1})
	switch {
	case err == nil && s.snapped != nil:
		expect(t, view, 0, s.snapped)
	case err != nil && s.snapped != nil && !s.deleted:
		t.Fatalf("the snapshot is gone: %v", err)
	}
	if err == nil {
		view.Close()
	}
}

// newScenario makes the disk on a volume of its own.
func newScenario(t *testing.T) (*scenario, *rig) {
	r := newRig(t, newVolume(32), self, scenarioSize)
	s := &scenario{d: r.Disk, v: r.v, flushed: make([]byte, scenarioSize), unsure: make([]bool, scenarioSize/page)}
	return s, r
}

func TestCrashAfterEveryWriteLosesNothingFlushed(t *testing.T) {
	for n := 1; ; n++ {
		s, r := newScenario(t)
		rng := rand.New(rand.NewPCG(uint64(n), 5))
		r.v.ops, r.v.stopAt, r.v.stopTorn = 0, n, rng
		s.run()
		if s.err == nil {
			if n < 45 {
				t.Fatalf("the scenario has only %d writes", n)
			}
			return
		}
		if !errors.Is(s.err, errStopped) {
			t.Fatalf("write %d: %v", n, s.err)
		}
		_ = s.d.Close(context.Background())
		r.v.crash(rng)
		checkClean(t, r.v, self)
		r.open()
		s.verify(t, r)
		r.write(0, pattern(9, 64<<10))
		r.close()
		checkClean(t, r.v, self)
		if t.Failed() {
			t.Fatalf("after a crash at write %d", n)
		}
	}
}

func TestEveryFailedOperationIsReportedAndHarmless(t *testing.T) {
	for n := 1; ; n++ {
		s, r := newScenario(t)
		r.v.ops, r.v.failAt, r.v.countReads = 0, n, true
		s.run()
		reached := r.v.ops >= n
		_ = s.d.Close(context.Background())
		r.v.mu.Lock()
		r.v.revive()
		r.v.mu.Unlock()
		if !reached {
			return
		}
		if s.err != nil && !errors.Is(s.err, errInjected) && !errors.Is(s.err, thinprov.ErrClosed) {
			t.Fatalf("operation %d: %v", n, s.err)
		}
		r.v.crash(rand.New(rand.NewPCG(uint64(n), 6)))
		checkClean(t, r.v, self)
		r.open()
		s.verify(t, r)
		r.close()
		checkClean(t, r.v, self)
		if t.Failed() {
			t.Fatalf("after a failure of operation %d", n)
		}
	}
}

func TestFailedFlushIsForGood(t *testing.T) {
	r := newRig(t, newVolume(32), self, 4<<20)
	r.write(0, pattern(1, 4096))
	r.write(0, pattern(2, 4096))
	r.v.mu.Lock()
	r.v.ops, r.v.failAt = 0, 1
	r.v.mu.Unlock()
	if err := r.Flush(t.Context()); !errors.Is(err, thinprov.ErrFailed) || !errors.Is(err, errInjected) {
		t.Fatalf("flush: %v", err)
	}
	for what, err := range map[string]error{
		"flush":    r.Flush(t.Context()),
		"write":    r.WriteAt(t.Context(), pattern(3, 4096), 0),
		"discard":  r.Discard(t.Context(), 0, 4096),
		"close":    r.Close(t.Context()),
		"snapshot": func() error { _, err := r.Snapshot(t.Context(), "s", [16]byte{1}); return err }(),
	} {
		if !errors.Is(err, thinprov.ErrFailed) && !errors.Is(err, thinprov.ErrClosed) {
			t.Errorf("%s after a failed flush: %v", what, err)
		}
	}
}

// A full volume refuses what must allocate, loses nothing, and works again when
// there is room.
func TestFullVolume(t *testing.T) {
	for _, reserve := range []int{0, 1} {
		t.Run(fmt.Sprint("reserve=", reserve), func(t *testing.T) { fillVolume(t, reserve) })
	}
}

func fillVolume(t *testing.T, reserve int) {
	v := newVolume(12)
	v.reserve = reserve
	r := newRig(t, v, self, 64<<20)
	want := make([]byte, 64<<20)
	var off int64
	for {
		p := pattern(byte(off>>16), 64<<10)
		err := r.WriteAt(t.Context(), p, off)
		if errors.Is(err, thinprov.ErrNoSpace) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		copy(want[off:], p)
		off += 128 << 10 // every other chunk, so that the map is not one extent
	}
	if off < 8<<20 {
		t.Fatalf("full after %d bytes", off/2)
	}
	expect(t, r, 0, want)
	r.write(0, pattern(200, 4096)) // in place still works
	copy(want, pattern(200, 4096))
	if _, err := r.Snapshot(t.Context(), "s", [16]byte{1}); err != nil {
		t.Fatal(err)
	}
	for i := range int64(300) { // so do discards and checkpoints, many of them
		at := i * 2 * page % off
		if err := r.Discard(t.Context(), at, page); err != nil {
			t.Fatal(err)
		}
		copy(want[at:], make([]byte, page))
		if i%50 == 0 {
			if err := r.Checkpoint(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	expect(t, r, 0, want)
	if err := r.WriteAt(t.Context(), pattern(1, 64<<10), 0); !errors.Is(err, thinprov.ErrNoSpace) {
		t.Fatalf("write while the snapshot holds everything: %v", err)
	}
	if err := r.DeleteSnapshot(t.Context(), [16]byte{1}); err != nil {
		t.Fatal(err)
	}
	r.write(0, pattern(77, 64<<10))
	copy(want, pattern(77, 64<<10))
	expect(t, r, 0, want)
	r.stop()
	checkClean(t, v, self)
	r.open()
	expect(t, r, 0, want)
	if err := r.Discard(t.Context(), 0, 64<<20); err != nil {
		t.Fatal(err)
	}
	r.close()
	checkClean(t, v, self)
}

const writers, region = 8, 256 << 10

// writeRegion changes and reads back the w-th region for some rounds, and now and
// then writes to the region of all. It returns what the w-th must hold.
func writeRegion(t *testing.T, r *rig, w, rounds int) []byte {
	rng := rand.New(rand.NewPCG(uint64(w), 4))
	base := int64(w) * region
	mine, got := make([]byte, region), make([]byte, region)
	for i := range rounds {
		off := rng.Int64N(region/sector) * sector
		n := min(sector*(1+rng.Int64N(40)), region-off)
		p := pattern(byte(i+w), int(n))
		var err error
		switch i % 5 {
		case 3:
			clear(p)
			err = r.Discard(t.Context(), base+off, n)
		case 4:
			shared := bytes.Repeat([]byte{byte(w + 1)}, 16*sector)
			err = errors.Join(r.WriteAt(t.Context(), shared, writers*region+rng.Int64N(64)*sector), r.Flush(t.Context()))
			off, p = 0, nil
		default:
			err = r.WriteAt(t.Context(), p, base+off)
		}
		copy(mine[off:], p)
		if err = errors.Join(err, r.ReadAt(t.Context(), got, base)); err != nil {
			t.Errorf("writer %d: %v", w, err)
			return nil
		}
		if at := firstDiff(got, mine); at >= 0 {
			t.Errorf("writer %d, round %d: byte %d differs", w, i, at)
			return nil
		}
	}
	return mine
}

// Requests from many goroutines, snapshots and checkpoints at once. Each region has
// one writer that knows its content; one region is written by all.
func TestConcurrentRequests(t *testing.T) {
	v := newVolume(96)
	r := newRig(t, v, self, (writers+1)*region)
	rounds := 120
	if raceEnabled {
		rounds = 50
	}
	var stop atomic.Bool
	var side, main sync.WaitGroup
	side.Go(func() {
		for i := 1; !stop.Load(); i++ {
			id := [16]byte{byte(i), byte(i >> 8), 1}
			if _, err := r.Snapshot(t.Context(), "s"+string(rune('a'+i%20)), id); err != nil {
				t.Errorf("snapshot: %v", err)
				return
			}
			if err := r.Checkpoint(t.Context()); err != nil {
				t.Errorf("checkpoint: %v", err)
				return
			}
			if err := r.DeleteSnapshot(t.Context(), id); err != nil {
				t.Errorf("delete: %v", err)
				return
			}
		}
	})
	content := make([][]byte, writers)
	for w := range writers {
		main.Go(func() { content[w] = writeRegion(t, r, w, rounds) })
	}
	main.Wait()
	stop.Store(true)
	side.Wait()
	if t.Failed() {
		return
	}
	r.stop()
	checkClean(t, v, self)
	r.open()
	for w, mine := range content {
		expect(t, r, int64(w)*region, mine)
	}
	r.close()
	checkClean(t, v, self)
}

func TestOpenRefusesAnOlderGeneration(t *testing.T) {
	r := newRig(t, newVolume(32), self, 1<<20)
	r.write(0, pattern(1, 4096))
	r.stop()
	_, err := thinprov.Open(t.Context(), r.store(), clock.NewFake(), quiet(), thinprov.Options{})
	if !errors.Is(err, thinprov.ErrStale) {
		t.Fatalf("open under the generation of the killed opener: %v", err)
	}
}

// Opening is an operation like any other: it fails with the cause, and the next
// opener starts from the same state.
func TestFailedOpenChangesNothing(t *testing.T) {
	s, r := newScenario(t)
	_ = s.write(0, pattern(1, 300<<10)) && s.snapshot() && s.write(4096, pattern(4, 64<<10)) && s.discard(64<<10, 64<<10)
	if s.err != nil {
		t.Fatal(s.err)
	}
	r.stop()
	for n := 1; ; n++ {
		v := r.v.clone()
		v.failAt, v.countReads = n, true
		other := &rig{t: t, v: v, ref: self, gen: 5}
		d, err := thinprov.Open(t.Context(), other.store(), clock.NewFake(), quiet(), thinprov.Options{})
		if err == nil {
			if v.ops >= n {
				t.Fatalf("operation %d failed, and Open did not tell", n)
			}
			_ = d.Close(t.Context())
			return
		}
		if !errors.Is(err, errInjected) {
			t.Fatalf("operation %d: %v", n, err)
		}
		v.revive()
		v.crash(rand.New(rand.NewPCG(uint64(n), 6)))
		checkClean(t, v, self)
		other.open()
		s.verify(t, other)
		other.close()
		checkClean(t, v, self)
	}
}
