package thinprov_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// The store is memory, so that what is measured is the engine.
func benchRig(b *testing.B) *rig {
	r := newRig(b, newVolume(900), self, 256<<20)
	p := pattern(1, 1<<20)
	for off := int64(0); off < 256<<20; off += 1 << 20 {
		r.write(off, p)
	}
	b.SetBytes(page)
	b.ReportAllocs()
	return r
}

func BenchmarkRandomRead4K(b *testing.B) {
	r := benchRig(b)
	rng := rand.New(rand.NewPCG(1, 1))
	p := make([]byte, page)
	for b.Loop() {
		if err := r.ReadAt(b.Context(), p, rng.Int64N(256<<20/page)*page); err != nil {
			b.Fatal(err)
		}
	}
	r.close()
}

func BenchmarkRandomOverwrite4K(b *testing.B) {
	r := benchRig(b)
	rng := rand.New(rand.NewPCG(1, 1))
	p := make([]byte, page)
	for b.Loop() {
		r.write(rng.Int64N(4096)*page, p)
		r.v.mu.Lock()
		clear(r.v.cached)
		r.v.mu.Unlock()
	}
	r.close()
}

func BenchmarkAllocatingWrite4K(b *testing.B) {
	r := benchRig(b)
	p := make([]byte, page)
	at, n := int64(0), byte(0)
	for b.Loop() {
		if at%(128<<20) == 0 {
			if _, err := r.Snapshot(b.Context(), fmt.Sprint(n), [16]byte{n + 100}); err != nil {
				b.Fatal(err)
			}
			if err := r.DeleteSnapshot(b.Context(), [16]byte{n + 99}); n > 0 && err != nil {
				b.Fatal(err)
			}
			n++
		}
		r.write(at, p)
		at = (at + page) % (256 << 20)
	}
	r.close()
}
