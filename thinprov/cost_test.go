package thinprov_test

import (
	"fmt"
	"testing"

	"basalt/internal/clock"
	"basalt/thinprov"
)

// cost runs f and returns what it made the volume do.
func (v *volume) cost(f func()) counts {
	v.mu.Lock()
	v.counts = counts{}
	v.mu.Unlock()
	f()
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.counts
}

func TestOverwriteIsOneWriteAndNothingElse(t *testing.T) {
	r := newRig(t, newVolume(64), self, 16<<20)
	r.write(0, pattern(1, 4<<20))
	for _, n := range []int{512, 4096, 64 << 10, 1 << 20} {
		p := pattern(2, n)
		if got, want := r.v.cost(func() { r.write(1<<20, p) }), (counts{writes: 1}); got != want {
			t.Errorf("overwrite of %d bytes: %+v, want %+v", n, got, want)
		}
		got := r.v.cost(func() {
			if err := r.WriteFUA(t.Context(), p, 1<<20); err != nil {
				t.Fatal(err)
			}
		})
		if want := (counts{fua: 1}); got != want {
			t.Errorf("durable overwrite of %d bytes: %+v, want %+v", n, got, want)
		}
	}
	r.close()
}

func TestContiguousReadIsOneRead(t *testing.T) {
	r := newRig(t, newVolume(64), self, 16<<20)
	for off := int64(0); off < 4<<20; off += 128 << 10 { // sequential, in pieces
		r.write(off, pattern(byte(off>>17), 128<<10))
	}
	p := make([]byte, 900<<10)
	got := r.v.cost(func() {
		if err := r.ReadAt(t.Context(), p, 64<<10); err != nil {
			t.Fatal(err)
		}
	})
	if want := (counts{reads: 1}); got != want {
		t.Errorf("read of 900 KiB written in order: %+v, want %+v", got, want)
	}
	got = r.v.cost(func() {
		if err := r.ReadAt(t.Context(), p, 8<<20); err != nil {
			t.Fatal(err)
		}
	})
	if got != (counts{}) {
		t.Errorf("read of a hole: %+v, want no I/O", got)
	}
	r.close()
}

// Neighbours that were written one by one, out of order, lie side by side.
func TestNeighboursMergeBack(t *testing.T) {
	r := newRig(t, newVolume(64), self, 16<<20)
	for _, i := range []int64{3, 15, 0, 7, 1, 2, 14, 4, 9, 5, 6, 8, 10, 13, 12, 11} {
		r.write(1<<20+i*4096, pattern(byte(i), 4096))
	}
	got := r.v.cost(func() {
		if err := r.ReadAt(t.Context(), make([]byte, 64<<10), 1<<20); err != nil {
			t.Fatal(err)
		}
	})
	if want := (counts{reads: 1}); got != want {
		t.Errorf("read of 64 KiB written block by block: %+v, want %+v", got, want)
	}
	r.close()
}

func TestSnapshotCostDoesNotDependOnSize(t *testing.T) {
	for _, mapped := range []int64{1 << 20, 1 << 30} {
		v := newVolume(1200)
		r := newRig(t, v, self, 2<<30)
		p := pattern(1, 1<<20)
		for off := int64(0); off < mapped; off += 1 << 20 {
			r.write(off, p)
		}
		r.write(2<<30-page, p[:page]) // so that there is a slab with room
		if err := r.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
		r.write(0, p) // something to flush
		got := v.cost(func() {
			if _, err := r.Snapshot(t.Context(), "s", [16]byte{1}); err != nil {
				t.Fatal(err)
			}
		})
		if want := (counts{flushes: 1, fua: 1}); got != want {
			t.Errorf("snapshot with %d MiB mapped: %+v, want %+v", mapped>>20, got, want)
		}
		got = v.cost(func() { r.write(512<<10, p[:4096]) })
		if want := (counts{writes: 1, flushes: 1, fua: 1}); got != want {
			t.Errorf("first 4 KiB write after a snapshot: %+v, want %+v", got, want)
		}
		r.close()
	}
}

func TestCloneCostDoesNotDependOnSize(t *testing.T) {
	var all []counts
	for _, mapped := range []int64{1 << 20, 256 << 20} {
		v := newVolume(400)
		r := newRig(t, v, self, 1<<30)
		p := pattern(1, 1<<20)
		for off := int64(0); off < mapped; off += 1 << 20 {
			r.write(off, p)
		}
		if _, err := r.Snapshot(t.Context(), "s", [16]byte{1}); err != nil {
			t.Fatal(err)
		}
		if err := r.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
		object2 := thinprov.Ref{Slot: 2, Incarnation: 1}
		payload, err := r.Publish(t.Context(), [16]byte{1}, object2)
		if err != nil {
			t.Fatal(err)
		}
		clone := &rig{t: t, v: v, ref: thinprov.Ref{Slot: 3, Incarnation: 1}, gen: 1}
		all = append(all, v.cost(func() {
			opts := thinprov.CreateOptions{UUID: [16]byte{5}}
			if err := thinprov.CreateClone(t.Context(), clone.store(), clock.NewFake(), payload, object2, opts); err != nil {
				t.Fatal(err)
			}
		}))
		clone.open()
		expect(t, clone, mapped-1<<20, p)
		got := v.cost(func() { clone.write(0, p[:4096]) })
		got.claims, got.reads = 0, 0 // the clone's first slab, and the way to the leaf
		if got.writes != 1 {
			t.Errorf("first write to a clone: %+v, want one data write", got)
		}
		st, err := clone.Stat(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if st.MappedBytes != mapped || st.ExclusiveBytes != 4096 || st.ForeignBytes != mapped-4096 {
			t.Errorf("clone of %d bytes after one write: %+v", mapped, st)
		}
		clone.close()
		r.close()
		checkClean(t, v, clone.ref)
		checkClean(t, v, self)
	}
	if all[0] != all[1] {
		t.Errorf("clone costs %+v for 1 MiB and %+v for 256 MiB", all[0], all[1])
	}
}

func TestSpaceNumbers(t *testing.T) {
	r := newRig(t, newVolume(64), self, 16<<20)
	r.write(0, pattern(1, 1<<20))
	stat := func(mapped, exclusive int64) {
		t.Helper()
		st, err := r.Stat(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if st.MappedBytes != mapped || st.ExclusiveBytes != exclusive || st.SharedBytes != mapped-exclusive {
			t.Fatalf("mapped %d exclusive %d shared %d, want %d and %d", st.MappedBytes, st.ExclusiveBytes, st.SharedBytes, mapped, exclusive)
		}
	}
	snap := func(i byte) {
		t.Helper()
		if _, err := r.Snapshot(t.Context(), fmt.Sprint("s", i), [16]byte{i}); err != nil {
			t.Fatal(err)
		}
	}
	stat(1<<20, 1<<20)
	snap(1)
	stat(1<<20, 0)
	r.write(0, pattern(2, 64<<10))
	r.write(2<<20, pattern(2, 64<<10))
	stat(1<<20+64<<10, 128<<10)
	snap(2)
	r.write(0, pattern(3, 4096))
	stat(1<<20+64<<10, 4096)
	for i, want := range map[byte]int64{1: 64 << 10, 2: 4096} {
		st, err := r.SnapshotStat(t.Context(), [16]byte{i})
		if err != nil {
			t.Fatal(err)
		}
		if st.ExclusiveBytes != want {
			t.Errorf("snapshot %d: exclusive %d bytes, want %d", i, st.ExclusiveBytes, want)
		}
	}
	if err := r.DeleteSnapshot(t.Context(), [16]byte{2}); err != nil {
		t.Fatal(err)
	}
	stat(1<<20+64<<10, 128<<10)
	r.close()
	checkClean(t, r.v, self)
}
