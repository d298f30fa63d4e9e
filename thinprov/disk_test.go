package thinprov_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"testing"

	"basalt/block"
	"basalt/internal/clock"
	"basalt/thinprov"
)

var self = thinprov.Ref{Slot: 1, Incarnation: 1}

// rig is a disk on a volume, and what it takes to open it again.
type rig struct {
	*thinprov.Disk
	t   testing.TB
	v   *volume
	ref thinprov.Ref
	gen uint64
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func newRig(t testing.TB, v *volume, ref thinprov.Ref, size int64) *rig {
	t.Helper()
	r := &rig{t: t, v: v, ref: ref, gen: 1}
	opts := thinprov.CreateOptions{SizeBytes: size, UUID: [16]byte{byte(ref.Slot), 9}}
	if err := thinprov.Create(t.Context(), r.store(), clock.NewFake(), opts); err != nil {
		t.Fatal(err)
	}
	r.open()
	return r
}

func (r *rig) store() *object { return &object{v: r.v, ref: r.ref, gen: r.gen} }

func (r *rig) open() {
	r.t.Helper()
	r.gen++
	d, err := thinprov.Open(r.t.Context(), r.store(), clock.NewFake(), quiet(), thinprov.Options{BootID: [16]byte{1}})
	if err != nil {
		r.t.Fatalf("open: %v", err)
	}
	r.Disk = d
}

func (r *rig) close() {
	r.t.Helper()
	if err := r.Close(r.t.Context()); err != nil {
		r.t.Fatalf("close: %v", err)
	}
}

// stop ends the disk without a word to the volume, as a killed process does.
func (r *rig) stop() {
	r.v.mu.Lock()
	r.v.stopAt, r.v.stopTorn = 1, nil
	r.v.mu.Unlock()
	_ = r.Close(context.WithoutCancel(r.t.Context()))
	r.v.mu.Lock()
	r.v.revive()
	r.v.mu.Unlock()
}

func pattern(seed byte, n int) []byte {
	b := make([]byte, n)
	rng := rand.New(rand.NewPCG(uint64(seed), 1))
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func (r *rig) write(off int64, p []byte) {
	r.t.Helper()
	if err := r.WriteAt(r.t.Context(), p, off); err != nil {
		r.t.Fatalf("write %d at %d: %v", len(p), off, err)
	}
}

type readerAt interface {
	ReadAt(ctx context.Context, p []byte, off int64) error
}

func expect(t testing.TB, d readerAt, off int64, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if err := d.ReadAt(t.Context(), got, off); err != nil {
		t.Fatalf("read %d at %d: %v", len(want), off, err)
	}
	if i := firstDiff(got, want); i >= 0 {
		t.Fatalf("read %d at %d: byte %d is %#x, want %#x", len(want), off, i, got[i], want[i])
	}
}

func firstDiff(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

func TestWrittenBytesReadBackAtAnySector(t *testing.T) {
	for _, logical := range []int{512, 4096} {
		v := newVolume(64)
		v.logical = logical
		r := newRig(t, v, self, 8<<20)
		want := make([]byte, 8<<20)
		rng := rand.New(rand.NewPCG(1, 2))
		for i := range 200 {
			off := rng.Int64N(8<<20/sector) * sector
			n := min(rng.Int64N(64)*sector+sector, 8<<20-off)
			p := pattern(byte(i), int(n))
			copy(want[off:], p)
			r.write(off, p)
		}
		expect(t, r, 0, want)
		r.close()
		checkClean(t, v, self)
		r.open()
		expect(t, r, 0, want)
		r.close()
	}
}

func TestReopenAfterKillReplaysTheLog(t *testing.T) {
	r := newRig(t, newVolume(64), self, 8<<20)
	a, b := pattern(1, 64<<10), pattern(2, 4096)
	r.write(1<<20, a)
	r.write(4<<20, b)
	if err := r.Discard(t.Context(), 1<<20, 4096); err != nil {
		t.Fatal(err)
	}
	r.stop()
	checkClean(t, r.v, self)
	r.open()
	copy(a, make([]byte, 4096))
	expect(t, r, 1<<20, a)
	expect(t, r, 4<<20, b)
	r.close()
	checkClean(t, r.v, self)
}

func TestSnapshotKeepsContent(t *testing.T) {
	r := newRig(t, newVolume(64), self, 8<<20)
	a := pattern(1, 256<<10)
	r.write(0, a)
	s, err := r.Snapshot(t.Context(), "one", [16]byte{1})
	if err != nil {
		t.Fatal(err)
	}
	r.write(8192, pattern(2, 4096))
	r.write(100<<10, pattern(3, 512))
	view, err := r.View(t.Context(), s.UUID)
	if err != nil {
		t.Fatal(err)
	}
	expect(t, view, 0, a)
	if err := r.DeleteSnapshot(t.Context(), s.UUID); !errors.Is(err, thinprov.ErrBusy) {
		t.Fatalf("delete with an open view: %v", err)
	}
	if err := view.Close(); err != nil {
		t.Fatal(err)
	}
	copy(a[8192:], pattern(2, 4096))
	copy(a[100<<10:], pattern(3, 512))
	expect(t, r, 0, a)
	before, _ := r.SnapshotStat(t.Context(), s.UUID)
	if before.ExclusiveBytes != 8192 {
		t.Fatalf("exclusive %d bytes, want two blocks", before.ExclusiveBytes)
	}
	if err := r.DeleteSnapshot(t.Context(), s.UUID); err != nil {
		t.Fatal(err)
	}
	expect(t, r, 0, a)
	r.close()
	checkClean(t, r.v, self)
}

func TestRangesAreRefusedOutsideOfTheDisk(t *testing.T) {
	r := newRig(t, newVolume(16), self, 1<<20)
	p := make([]byte, 1024)
	if err := r.WriteAt(t.Context(), p, 1<<20-512); !errors.Is(err, block.ErrOutOfRange) {
		t.Errorf("write over the end: %v", err)
	}
	if err := r.ReadAt(t.Context(), p, 100); !errors.Is(err, block.ErrMisaligned) {
		t.Errorf("read between sectors: %v", err)
	}
	if err := r.Discard(t.Context(), -512, 512); !errors.Is(err, block.ErrOutOfRange) {
		t.Errorf("discard before the start: %v", err)
	}
	r.close()
	if err := r.ReadAt(t.Context(), p, 0); !errors.Is(err, thinprov.ErrClosed) {
		t.Errorf("read after close: %v", err)
	}
}
