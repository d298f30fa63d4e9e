package thinprov_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"basalt/internal/clock"
	"basalt/thinprov"
)

// A map of three levels, through snapshots, their deletion, and reopening.
func TestMapOfManyExtents(t *testing.T) {
	const blocks = 40_000
	v := newVolume(400)
	r := newRig(t, v, self, blocks*page)
	p := make([]byte, page)
	mark := func(i, gen int64) []byte {
		for j := 0; j < page; j += 512 {
			p[j], p[j+1], p[j+2], p[j+3] = byte(i), byte(i>>8), byte(i>>16), byte(gen)
		}
		return p
	}
	want := make([]int64, blocks) // generation, 0 for a hole
	write := func(i, gen int64) {
		r.write(i*page, mark(i, gen))
		want[i] = gen
	}
	for i := int64(0); i < blocks; i += 2 {
		write(i, 1)
	}
	rng := rand.New(rand.NewPCG(1, 3))
	var old [][]int64
	for s := range byte(3) {
		if _, err := r.Snapshot(t.Context(), string('a'+rune(s)), [16]byte{s + 1}); err != nil {
			t.Fatal(err)
		}
		old = append(old, slices.Clone(want))
		for range 2000 {
			write(rng.Int64N(blocks), int64(s)+2)
		}
		if s == 1 {
			r.stop()
			r.open()
		}
	}
	check := func(d readerAt, want []int64) {
		t.Helper()
		got, hole := make([]byte, page), make([]byte, page)
		for i := range int64(blocks) {
			if err := d.ReadAt(t.Context(), got, i*page); err != nil {
				t.Fatal(err)
			}
			content := hole
			if want[i] != 0 {
				content = mark(i, want[i])
			}
			if firstDiff(got, content) >= 0 {
				t.Fatalf("block %d does not hold generation %d", i, want[i])
			}
		}
	}
	check(r, want)
	view, err := r.View(t.Context(), [16]byte{2})
	if err != nil {
		t.Fatal(err)
	}
	check(view, old[1])
	view.Close()
	for _, s := range []byte{2, 3, 1} {
		st, err := r.SnapshotStat(t.Context(), [16]byte{s})
		if err != nil {
			t.Fatal(err)
		}
		before, _ := r.Stat(t.Context())
		if err := r.DeleteSnapshot(t.Context(), [16]byte{s}); err != nil {
			t.Fatal(err)
		}
		after, _ := r.Stat(t.Context())
		if freed := after.FreeBytes - before.FreeBytes + before.SlabBytes - after.SlabBytes; freed < st.ExclusiveBytes {
			t.Errorf("snapshot %d: %d bytes freed, %d were exclusive", s, freed, st.ExclusiveBytes)
		}
		if s == 3 {
			r.stop()
			checkClean(t, v, self)
			r.open()
		}
	}
	check(r, want)
	r.close()
	if rep := checkClean(t, v, self); rep.Nodes < 150 {
		t.Fatalf("%d nodes make no three levels", rep.Nodes)
	}
}

func TestEmptySlabsGoBack(t *testing.T) {
	v := newVolume(64)
	r := newRig(t, v, self, 32<<20)
	r.write(0, make([]byte, 32<<20))
	if n := len(v.owned(self)); n < 35 {
		t.Fatalf("%d slabs for 32 MiB", n)
	}
	if err := r.Discard(t.Context(), 0, 32<<20); err != nil {
		t.Fatal(err)
	}
	r.close()
	if n := len(v.owned(self)); n > 6 {
		t.Errorf("%d slabs for nothing", n)
	}
	checkClean(t, v, self)
}

func TestSlabsListsAllInOrderOfRelease(t *testing.T) {
	v := newVolume(64)
	r := newRig(t, v, self, 32<<20)
	r.write(0, pattern(1, 3<<20))
	r.stop()
	got, err := thinprov.Slabs(t.Context(), &object{v: v, ref: self})
	if err != nil {
		t.Fatal(err)
	}
	sorted := slices.Sorted(slices.Values(got))
	if !slices.Equal(sorted, v.owned(self)) {
		t.Errorf("slabs %v, the volume says %v", sorted, v.owned(self))
	}
	if last := got[len(got)-3:]; !slices.Equal(last, []int64{3 * slabSize, 1 * slabSize, 2 * slabSize}) {
		t.Errorf("the last three are %v, want the tree's and the log's", last)
	}
}

// Create may be cut off anywhere: what it has claimed is found by the header.
func TestCreateCutOffLeaksNothing(t *testing.T) {
	for n := 1; ; n++ {
		v := newVolume(32)
		v.stopAt, v.stopTorn = n, rand.New(rand.NewPCG(uint64(n), 1))
		o := &object{v: v, ref: self, gen: 1}
		err := thinprov.Create(t.Context(), o, clock.NewFake(), thinprov.CreateOptions{SizeBytes: 1 << 20, UUID: [16]byte{1}})
		v.revive()
		got, lerr := thinprov.Slabs(t.Context(), o)
		if errors.Is(lerr, thinprov.ErrNoHeader) {
			got, lerr = nil, nil
		}
		if lerr != nil {
			t.Fatalf("stop at %d: %v", n, lerr)
		}
		slices.Sort(got)
		if !slices.Equal(got, v.owned(self)) {
			t.Fatalf("stop at %d: slabs %v, the volume says %v", n, got, v.owned(self))
		}
		if err == nil {
			return
		}
	}
}

func TestReadOnlyOpenWritesNothing(t *testing.T) {
	v := newVolume(32)
	r := newRig(t, v, self, 4<<20)
	r.write(0, pattern(1, 64<<10))
	r.stop()
	v.stopAt = 1 // any change fails
	d, err := thinprov.Open(t.Context(), &object{v: v, ref: self}, clock.NewFake(), quiet(), thinprov.Options{})
	if err != nil {
		t.Fatal(err)
	}
	expect(t, d, 0, pattern(1, 64<<10))
	if err := d.WriteAt(t.Context(), make([]byte, 512), 0); !errors.Is(err, thinprov.ErrReadOnly) {
		t.Errorf("write: %v", err)
	}
	if st, err := d.Stat(t.Context()); err != nil || st.MappedBytes != 64<<10 {
		t.Errorf("stat: %+v, %v", st, err)
	}
	if err := d.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestResizeGrowsAndKeepsContent(t *testing.T) {
	r := newRig(t, newVolume(32), self, 1<<20)
	r.write(1<<20-page, pattern(1, page))
	if err := r.Resize(t.Context(), 1<<19); !errors.Is(err, thinprov.ErrShrink) {
		t.Errorf("shrink: %v", err)
	}
	if err := r.Resize(t.Context(), 2<<20); err != nil {
		t.Fatal(err)
	}
	r.write(2<<20-512, pattern(2, 512))
	r.stop()
	r.open()
	if r.SizeBytes() != 2<<20 {
		t.Errorf("size %d", r.SizeBytes())
	}
	expect(t, r, 1<<20-page, append(pattern(1, page), make([]byte, page)...))
	expect(t, r, 2<<20-512, pattern(2, 512))
	r.close()
}

func TestMapTellsRunsInOrder(t *testing.T) {
	r := newRig(t, newVolume(32), self, 4<<20)
	r.write(64<<10, pattern(1, 64<<10))
	r.write(512<<10, pattern(1, 512))
	var got []thinprov.Run
	err := r.Map(t.Context(), 512, 1<<20, func(x thinprov.Run) bool { got = append(got, x); return true })
	if err != nil {
		t.Fatal(err)
	}
	want := []thinprov.Run{
		{OffBytes: 512, LenBytes: 64<<10 - 512}, {OffBytes: 64 << 10, LenBytes: 64 << 10, Mapped: true},
		{OffBytes: 128 << 10, LenBytes: 384 << 10}, {OffBytes: 512 << 10, LenBytes: page, Mapped: true},
		{OffBytes: 512<<10 + page, LenBytes: 512<<10 - page + 512},
	}
	if !slices.Equal(got, want) {
		t.Errorf("runs %+v, want %+v", got, want)
	}
	r.close()
}

func TestThousandSnapshotsAndNoMore(t *testing.T) {
	r := newRig(t, newVolume(64), self, 1<<20)
	for i := range 1000 {
		r.write(int64(i%200)*page, pattern(byte(i), page))
		if _, err := r.Snapshot(t.Context(), fmt.Sprint("s", i), [16]byte{byte(i), byte(i >> 8), 1}); err != nil {
			t.Fatalf("snapshot %d: %v", i, err)
		}
	}
	if _, err := r.Snapshot(t.Context(), "one more", [16]byte{0, 0, 2}); !errors.Is(err, thinprov.ErrLimit) {
		t.Errorf("snapshot 1001: %v", err)
	}
	r.stop()
	checkClean(t, r.v, self)
	r.open()
	if got := len(r.Snapshots()); got != 1000 {
		t.Errorf("%d snapshots after a kill", got)
	}
	for i := range 1000 {
		if err := r.DeleteSnapshot(t.Context(), [16]byte{byte(i), byte(i >> 8), 1}); err != nil {
			t.Fatalf("delete %d: %v", i, err)
		}
	}
	r.close()
	checkClean(t, r.v, self)
}
