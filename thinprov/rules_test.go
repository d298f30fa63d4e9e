package thinprov_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"

	"basalt/thinprov"
)

// Each test of this file guards one rule of the design and fails without it.

// gate holds the writes or reads of a volume that begin in a range of addresses.
type gate struct {
	mu       sync.Mutex
	from, to int64
	open     chan struct{}
	seen     []int64 // where all writes began, in order
}

func (g *gate) pass(off int64) {
	g.mu.Lock()
	g.seen = append(g.seen, off)
	wait := g.open
	if off < g.from || off >= g.to {
		wait = nil
	}
	g.mu.Unlock()
	if wait != nil {
		<-wait
	}
}

// shut holds what begins in [from,to) until the result is called.
func (g *gate) shut(from, to int64) func() {
	g.mu.Lock()
	defer g.mu.Unlock()
	wait := make(chan struct{})
	g.from, g.to, g.open, g.seen = from, to, wait, nil
	return func() {
		g.mu.Lock()
		g.from, g.to = 0, 0
		g.mu.Unlock()
		close(wait)
	}
}

func (g *gate) wrote(off int64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, s := range g.seen {
		if s == off {
			return true
		}
	}
	return false
}

// The log is in slabs 1 and 2 of a fresh volume, the nodes in slab 3, data from 4.
const (
	logStart, logEnd = 1 * slabSize, 3 * slabSize
	dataStart        = 4 * slabSize
)

// fullRig is a disk on a volume without any free block; block i of the disk lies at
// dataStart + 4096 i.
func fullRig(t *testing.T) (*rig, *gate, *gate) {
	v := newVolume(5)
	writes, reads := &gate{}, &gate{}
	v.onWrite = func(off int64, _ int) { writes.pass(off) }
	v.onRead = func(off int64, _ int) { reads.pass(off) }
	r := newRig(t, v, self, 8<<20)
	r.write(0, pattern(1, 1<<20))
	return r, writes, reads
}

// R15: a block is not written again before the record that frees it is durable.
func TestFreedBlockWaitsForItsRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, writes, _ := fullRig(t)
		letGo := writes.shut(logStart, logEnd)
		var work sync.WaitGroup
		work.Go(func() {
			if err := r.Discard(t.Context(), 40*page, page); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		work.Go(func() {
			if err := r.WriteAt(t.Context(), pattern(2, page), 4<<20); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		if writes.wrote(dataStart + 40*page) {
			t.Error("the block was written while its freeing was not durable")
		}
		letGo()
		work.Wait()
		if !writes.wrote(dataStart + 40*page) {
			t.Error("the block was not used even then")
		}
		r.close()
	})
}

// R15: nor before a read of it that is in progress has ended.
func TestFreedBlockWaitsForReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, writes, reads := fullRig(t)
		letGo := reads.shut(dataStart, dataStart+slabSize)
		var work sync.WaitGroup
		work.Go(func() { expect(t, r, 40*page, pattern(1, 1<<20)[40*page:41*page]) })
		synctest.Wait()
		if err := r.Discard(t.Context(), 40*page, page); err != nil {
			t.Fatal(err)
		}
		writes.shut(0, 0)
		err := r.WriteAt(t.Context(), pattern(2, page), 4<<20)
		if !errors.Is(err, thinprov.ErrNoSpace) || writes.wrote(dataStart+40*page) {
			t.Errorf("the block was written during a read of it (%v)", err)
		}
		letGo()
		work.Wait()
		r.write(4<<20, pattern(2, page))
		r.close()
	})
}

// A write in place is not acknowledged on a mapping that a crash would undo.
func TestOverwriteWaitsForTheMappingItUses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVolume(16)
		writes := &gate{}
		v.onWrite = func(off int64, _ int) { writes.pass(off) }
		r := newRig(t, v, self, 8<<20)
		r.write(64<<10, pattern(1, page))
		letGo := writes.shut(logStart, logEnd)
		var work sync.WaitGroup
		ctx, cancel := context.WithCancel(t.Context())
		work.Go(func() {
			if err := r.WriteAt(ctx, pattern(2, page), 0); !errors.Is(err, context.Canceled) {
				t.Errorf("first write: %v", err)
			}
		})
		synctest.Wait()
		cancel() // the request goes, the order stays
		acked := false
		work.Go(func() { r.write(0, pattern(3, page)); acked = true })
		synctest.Wait()
		if acked {
			t.Error("overwrite acknowledged while the mapping was not durable")
		}
		letGo()
		work.Wait()
		r.stop()
		r.open()
		expect(t, r, 0, pattern(3, page))
		r.close()
	})
}

// A snapshot waits for the writes in place that are on their way, so that none of
// them changes it later.
func TestSnapshotWaitsForWritesInProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, writes, _ := fullRig(t)
		letGo := writes.shut(dataStart, dataStart+slabSize)
		var work sync.WaitGroup
		work.Go(func() { r.write(8*page, pattern(2, page)) })
		synctest.Wait()
		done := false
		work.Go(func() {
			if _, err := r.Snapshot(t.Context(), "s", [16]byte{1}); err != nil {
				t.Error(err)
			}
			done = true
		})
		synctest.Wait()
		if done {
			t.Error("the snapshot was taken in the middle of a write in place")
		}
		letGo()
		work.Wait()
		r.close()
	})
}

// A write whose outcome is unknown may land later. It must not undo a write that was
// acknowledged since.
func TestLateWriteHitsNothingNew(t *testing.T) {
	r := newRig(t, newVolume(16), self, 8<<20)
	r.write(0, pattern(1, 16*page))
	r.v.mu.Lock()
	r.v.ops, r.v.failAt = 0, 1
	r.v.mu.Unlock()
	if err := r.WriteAt(t.Context(), pattern(2, page), 5*page); !errors.Is(err, errInjected) {
		t.Fatalf("write: %v", err)
	}
	r.write(5*page, pattern(3, page))
	r.v.put(pattern(2, page), dataStart+5*page, false) // now it lands
	expect(t, r, 5*page, pattern(3, page))
	r.write(6*page, pattern(4, page))
	if got := r.v.cost(func() { r.write(5*page, pattern(5, page)) }); got != (counts{writes: 1}) {
		t.Errorf("overwrite of the new place: %+v", got)
	}
	r.close()
	checkClean(t, r.v, self)
}

// R13: a record of an earlier opener behind the end of the log never comes back.
func TestOldRecordBehindTheEndIsNotReplayed(t *testing.T) {
	v := newVolume(16)
	var log []int64
	v.onWrite = func(off int64, _ int) {
		if off >= logStart && off < logEnd {
			log = append(log, off)
		}
	}
	r := newRig(t, v, self, 8<<20)
	r.write(2<<20, pattern(8, page)) // claims a slab
	log = nil
	for i := range int64(3) {
		r.write(i*(64<<10), pattern(byte(i+1), page))
	}
	v.mu.Lock()
	third := *v.visible(log[2] / page)
	second := log[1]
	v.put(make([]byte, page), second, true) // lost by the device
	v.mu.Unlock()
	r.stop()
	r.open() // replays the first record only
	log = nil
	r.write(1<<20, pattern(9, page))
	if log[0] != second {
		t.Fatalf("the new opener's record is at %d, not at %d", log[0], second)
	}
	if got := *v.visible(second/page + 1); got != third {
		t.Fatal("the old record is no longer there: the test tests nothing")
	}
	r.stop()
	if rep := checkClean(t, v, self); rep.Replayed != 1 {
		t.Errorf("%d records replayed, want 1", rep.Replayed)
	}
	r.open()
	expect(t, r, 128<<10, make([]byte, page))
	expect(t, r, 1<<20, pattern(9, page))
	r.close()
}

// R14: one header write that is acknowledged but lost loses nothing, whichever it is.
func TestLostHeaderWriteLosesNothing(t *testing.T) {
	for lost := range 4 {
		t.Run(fmt.Sprint(lost), func(t *testing.T) {
			v := newVolume(24)
			r := newRig(t, v, self, 8<<20)
			want := make([]byte, 8<<20)
			rng := rand.New(rand.NewPCG(uint64(lost), 8))
			for i := range 5 {
				for range 12 {
					off := rng.Int64N(2048) * page
					p := pattern(byte(rng.Uint32()), page)
					copy(want[off:], p)
					r.write(off, p)
				}
				v.mu.Lock()
				v.loseHeader = i == lost
				v.mu.Unlock()
				if err := r.Checkpoint(t.Context()); err != nil {
					t.Fatal(err)
				}
				if i > lost {
					continue
				}
				if i < lost {
					continue
				}
				// Much happens before the next checkpoint, that could reuse what the
				// older header needs.
				for range 12 {
					off := rng.Int64N(2048) * page
					p := pattern(byte(rng.Uint32()), page)
					copy(want[off:], p)
					r.write(off, p)
				}
				break
			}
			if err := r.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			r.stop()
			v.crash(rng)
			v.loseHeader = false
			checkClean(t, v, self)
			r.open()
			expect(t, r, 0, want)
			r.close()
			checkClean(t, v, self)
		})
	}
}

// R14: the checkpoint after a lost header begins to overwrite nothing that the older
// header needs, even if it is cut off in the middle.
func TestCheckpointAfterALostHeaderMayBeCutOff(t *testing.T) {
	for n := 1; n < 12; n++ {
		v := newVolume(24)
		r := newRig(t, v, self, 8<<20)
		want := make([]byte, 8<<20)
		rng := rand.New(rand.NewPCG(uint64(n), 8))
		some := func() {
			for range 20 {
				off := rng.Int64N(2048) * page
				p := pattern(byte(rng.Uint32()), page)
				copy(want[off:], p)
				r.write(off, p)
			}
		}
		for i := range 4 {
			some()
			v.mu.Lock()
			v.loseHeader = i == 3
			v.mu.Unlock()
			if err := r.Checkpoint(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		some()
		if err := r.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		v.mu.Lock()
		v.loseHeader = false
		v.ops, v.stopAt, v.stopTorn = 0, n, rng
		v.mu.Unlock()
		_ = r.Checkpoint(t.Context())
		_ = r.Close(t.Context())
		v.crash(rng)
		checkClean(t, v, self)
		r.open()
		expect(t, r, 0, want)
		r.close()
	}
}

// R14: the log is kept for the header before the newest, even if it fills up.
func TestLogIsKeptForTheOlderHeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVolume(24)
		writes := &gate{}
		v.onWrite = func(off int64, _ int) { writes.pass(off) }
		r := newRig(t, v, self, 8<<20)
		want := make([]byte, 8<<20)
		next := 0
		some := func(n int) {
			for range n { // one record each
				off := int64(next) * page
				next++
				r.write(off, pattern(byte(next), page))
				copy(want[off:], pattern(byte(next), page))
			}
		}
		some(100)
		if err := r.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
		some(150)
		v.mu.Lock()
		v.loseHeader = true
		v.mu.Unlock()
		if err := r.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
		letGo := writes.shut(3*slabSize, 4*slabSize) // the next checkpoint hangs
		var work sync.WaitGroup
		work.Go(func() { some(600) })
		synctest.Wait()
		after := v.clone()
		done := next - 1 // acknowledged; the last one waits for room in the log
		after.crash(rand.New(rand.NewPCG(1, 1)))
		checkClean(t, after, self)
		other := &rig{t: t, v: after, ref: self, gen: 5}
		other.open()
		expect(t, other, 0, want[:done*page])
		other.close()
		letGo()
		work.Wait()
		expect(t, r, 0, want)
		v.mu.Lock()
		v.loseHeader = false
		v.mu.Unlock()
		r.close()
	})
}

// R17: once published, a snapshot is known as such after any crash, and its map is on
// media.
func TestPublishedSnapshotSurvivesACrash(t *testing.T) {
	ref := thinprov.Ref{Slot: 5, Incarnation: 2}
	for n := 1; ; n++ {
		v := newVolume(24)
		r := newRig(t, v, self, 4<<20)
		want := make([]byte, 4<<20)
		copy(want[64<<10:], pattern(1, 300<<10))
		r.write(64<<10, pattern(1, 300<<10))
		if _, err := r.Snapshot(t.Context(), "s", [16]byte{1}); err != nil {
			t.Fatal(err)
		}
		r.write(64<<10, pattern(2, 100<<10))
		rng := rand.New(rand.NewPCG(uint64(n), 9))
		v.mu.Lock()
		v.ops, v.stopAt = 0, n
		v.mu.Unlock()
		payload, err := r.Publish(t.Context(), [16]byte{1}, ref)
		v.mu.Lock()
		untouched := v.ops < n
		v.stopAt = 1
		v.mu.Unlock()
		_ = r.Close(context.Background())
		v.crash(rng)
		checkClean(t, v, self)
		r.open()
		if err == nil {
			if err := r.DeleteSnapshot(t.Context(), [16]byte{1}); !errors.Is(err, thinprov.ErrPublished) {
				t.Fatalf("delete of a published snapshot: %v", err)
			}
			view, err := thinprov.OpenView(t.Context(), &object{v: v, ref: ref}, payload)
			if err != nil {
				t.Fatal(err)
			}
			expect(t, view, 0, want)
			if err := r.Unpublish(t.Context(), [16]byte{1}); err != nil {
				t.Fatal(err)
			}
			if err := r.DeleteSnapshot(t.Context(), [16]byte{1}); err != nil {
				t.Fatal(err)
			}
		}
		r.close()
		checkClean(t, v, self)
		if untouched {
			return
		}
	}
}

// R2: an open release is finished only for slabs that are still the disk's.
func TestReleasedSlabOfAnotherIsLeftAlone(t *testing.T) {
	for n := 1; ; n++ {
		v := newVolume(24)
		r := newRig(t, v, self, 8<<20)
		r.write(0, pattern(1, 8<<20))
		v.mu.Lock()
		v.ops, v.stopAt = 0, n
		v.mu.Unlock()
		err := r.Discard(t.Context(), 0, 8<<20)
		err = errors.Join(err, r.Close(t.Context()))
		v.mu.Lock()
		v.revive()
		other := thinprov.Ref{Slot: 2, Incarnation: 1}
		var taken []int64
		for s := 1; s < len(v.tags); s++ { // another object takes all that is free
			if v.tags[s] == (thinprov.Ref{}) {
				v.tags[s] = other
				taken = append(taken, int64(s)*slabSize)
				v.put(pattern(7, page), int64(s)*slabSize, true)
			}
		}
		v.mu.Unlock()
		checkClean(t, v, self)
		r.open()
		r.close()
		checkClean(t, v, self)
		for _, s := range taken {
			if firstDiff(v.visible(s / page)[:], pattern(7, page)) >= 0 {
				t.Fatalf("stop at %d: slab %d of another object was changed", n, s)
			}
		}
		if err == nil {
			return
		}
	}
}
