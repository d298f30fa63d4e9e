// Package blocktest is the conformance suite of block.Device: every device of the
// system passes Run, and every device that several hosts can open passes
// RunShared. It tests the contract written at block.Device and nothing that only
// one device promises; durability needs a device that can lose power, see simdev.
package blocktest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"sync"
	"testing"

	"basalt/block"
)

// MinBytes is the smallest device that the suite runs on.
const MinBytes = 1 << 20

// Run tests one handle at a time. Each call of open gives a fresh, writable device
// of at least MinBytes whose content is arbitrary; Run closes it.
func Run(t *testing.T, open func(t *testing.T) block.Device) {
	tests := []struct {
		name string
		run  func(t *testing.T, d *subject)
	}{
		{"GeometryIsSane", testGeometry},
		{"WrittenBytesReadBack", testReadBack},
		{"NeighboursOfAWriteKeepTheirBytes", testNeighbours},
		{"MemoryNeedsNoAlignment", testUnalignedMemory},
		{"EmptyTransfersSucceed", testEmpty},
		{"RangesBeyondTheEndAreRefused", testOutOfRange},
		{"PartialBlocksAreRefused", testMisaligned},
		{"ZeroesReadBack", testWriteZeroes},
		{"DiscardTouchesOnlyItsRange", testDiscard},
		{"MatchingCompareAndWriteReplacesTheUnit", testCAWMatch},
		{"MiscompareChangesNothing", testCAWMiscompare},
		{"MalformedCompareAndWriteIsRefused", testCAWMalformed},
		{"CancelledContextStopsBeforeSubmitting", testCancelled},
		{"ConcurrentTransfersDoNotMix", testConcurrent},
		{"ConcurrentCompareAndWriteLosesNoIncrement", testCAWCounter},
		{"CloseEndsTheDevice", testClose},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dev := open(t)
			t.Cleanup(func() { dev.Close() })
			g := dev.Geometry()
			if g.SizeBytes < MinBytes {
				t.Fatalf("device of %d bytes, the suite needs %d", g.SizeBytes, MinBytes)
			}
			tt.run(t, &subject{dev: dev, g: g, lb: int64(g.LogicalBytes), rng: rand.New(rand.NewPCG(1, 2))})
		})
	}
}

// subject is the device under test with its geometry at hand.
type subject struct {
	dev block.Device
	g   block.Geometry
	lb  int64 // logical block in bytes
	rng *rand.Rand
}

func (s *subject) random(n int64) []byte {
	b := block.AlignedBuffer(int(n))
	for i := range b {
		b[i] = byte(s.rng.Uint32())
	}
	return b
}

func (s *subject) write(t *testing.T, p []byte, offBytes int64) {
	t.Helper()
	if err := s.dev.WriteAt(t.Context(), p, offBytes); err != nil {
		t.Fatalf("write %d bytes at %d: %v", len(p), offBytes, err)
	}
}

func (s *subject) read(t *testing.T, offBytes, lenBytes int64) []byte {
	t.Helper()
	p := block.AlignedBuffer(int(lenBytes))
	if err := s.dev.ReadAt(t.Context(), p, offBytes); err != nil {
		t.Fatalf("read %d bytes at %d: %v", lenBytes, offBytes, err)
	}
	return p
}

func (s *subject) expect(t *testing.T, want []byte, offBytes int64) {
	t.Helper()
	got := s.read(t, offBytes, int64(len(want)))
	if i := firstDifference(got, want); i >= 0 {
		t.Fatalf("byte %d reads %#02x, want %#02x", offBytes+int64(i), got[i], want[i])
	}
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

func testGeometry(t *testing.T, s *subject) {
	for name, v := range map[string]int{"LogicalBytes": s.g.LogicalBytes, "UnitBytes": s.g.UnitBytes} {
		if v != 512 && v != 4096 {
			t.Errorf("%s = %d, want 512 or 4096", name, v)
		}
	}
	if s.g.UnitBytes%s.g.LogicalBytes != 0 {
		t.Errorf("unit of %d bytes is not whole blocks of %d", s.g.UnitBytes, s.g.LogicalBytes)
	}
	if s.g.SizeBytes%s.lb != 0 {
		t.Errorf("size %d is not whole blocks of %d", s.g.SizeBytes, s.lb)
	}
	if s.g.DiscardBytes < 0 || s.g.DiscardBytes%s.lb != 0 {
		t.Errorf("DiscardBytes = %d, want a multiple of %d", s.g.DiscardBytes, s.lb)
	}
}

func testReadBack(t *testing.T, s *subject) {
	writers := map[string]func(context.Context, []byte, int64) error{"WriteAt": s.dev.WriteAt, "WriteFUA": s.dev.WriteFUA}
	for name, write := range writers {
		for _, blocks := range []int64{1, 3, 8, 100} {
			for _, off := range []int64{0, 7 * s.lb, s.g.SizeBytes - blocks*s.lb} {
				want := s.random(blocks * s.lb)
				if err := write(t.Context(), want, off); err != nil {
					t.Fatalf("%s of %d blocks at %d: %v", name, blocks, off, err)
				}
				s.expect(t, want, off)
			}
		}
	}
	want := s.random(s.lb)
	s.write(t, want, 0)
	if err := s.dev.Flush(t.Context()); err != nil {
		t.Fatalf("flush: %v", err)
	}
	s.expect(t, want, 0)
}

func testNeighbours(t *testing.T, s *subject) {
	want := s.random(32 * s.lb)
	s.write(t, want, 0)
	mid := s.random(5 * s.lb)
	s.write(t, mid, 9*s.lb)
	copy(want[9*s.lb:], mid)
	s.expect(t, want, 0)
}

func testUnalignedMemory(t *testing.T, s *subject) {
	for _, blocks := range []int64{1, 9, 700} { // 700 blocks of 4096 exceed any one bounce buffer
		n := min(blocks*s.lb, s.g.SizeBytes/s.lb/2*s.lb)
		mem := make([]byte, n+1+block.BufferAlign)
		odd := mem[1 : 1+n]
		if block.IsAligned(odd) {
			odd = mem[2 : 2+n]
		}
		copy(odd, s.random(n))
		s.write(t, odd, s.lb)
		s.expect(t, odd, s.lb)

		back := make([]byte, n+3)[3:]
		if err := s.dev.ReadAt(t.Context(), back, s.lb); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(back, odd) {
			t.Fatalf("%d bytes into unaligned memory differ from what was written", n)
		}
		if err := s.dev.WriteFUA(t.Context(), odd[:s.lb], 0); err != nil {
			t.Fatal(err)
		}
		s.expect(t, odd[:s.lb], 0)
	}
}

func testEmpty(t *testing.T, s *subject) {
	before := s.read(t, 0, 4*s.lb)
	for _, off := range []int64{0, s.lb, s.g.SizeBytes} {
		for name, err := range map[string]error{
			"ReadAt":      s.dev.ReadAt(t.Context(), nil, off),
			"WriteAt":     s.dev.WriteAt(t.Context(), nil, off),
			"WriteFUA":    s.dev.WriteFUA(t.Context(), nil, off),
			"WriteZeroes": s.dev.WriteZeroes(t.Context(), off, 0),
			"Discard":     s.dev.Discard(t.Context(), off, 0),
		} {
			if err != nil {
				t.Errorf("%s of no bytes at %d: %v", name, off, err)
			}
		}
	}
	s.expect(t, before, 0)
}

// refused runs each ranged operation on the span and wants the error.
func (s *subject) refused(t *testing.T, want error, offBytes, lenBytes int64) {
	t.Helper()
	p := block.AlignedBuffer(int(lenBytes))
	for name, err := range map[string]error{
		"ReadAt":      s.dev.ReadAt(t.Context(), p, offBytes),
		"WriteAt":     s.dev.WriteAt(t.Context(), p, offBytes),
		"WriteFUA":    s.dev.WriteFUA(t.Context(), p, offBytes),
		"WriteZeroes": s.dev.WriteZeroes(t.Context(), offBytes, lenBytes),
		"Discard":     s.dev.Discard(t.Context(), offBytes, lenBytes),
	} {
		if !errors.Is(err, want) {
			t.Errorf("%s of %d bytes at %d: %v, want %v", name, lenBytes, offBytes, err, want)
		}
	}
}

func testOutOfRange(t *testing.T, s *subject) {
	tail := s.random(2 * s.lb)
	s.write(t, tail, s.g.SizeBytes-2*s.lb)
	s.refused(t, block.ErrOutOfRange, s.g.SizeBytes, s.lb)
	s.refused(t, block.ErrOutOfRange, s.g.SizeBytes-s.lb, 2*s.lb)
	s.refused(t, block.ErrOutOfRange, s.g.SizeBytes+s.lb, 0)
	s.refused(t, block.ErrOutOfRange, -s.lb, s.lb)
	s.refused(t, block.ErrOutOfRange, math.MaxInt64-s.lb+1, s.lb)
	for name, err := range map[string]error{
		"WriteZeroes": s.dev.WriteZeroes(t.Context(), 0, -s.lb),
		"Discard":     s.dev.Discard(t.Context(), 0, -s.lb),
	} {
		if !errors.Is(err, block.ErrOutOfRange) {
			t.Errorf("%s of a negative length: %v, want %v", name, err, block.ErrOutOfRange)
		}
	}
	s.expect(t, tail, s.g.SizeBytes-2*s.lb)
}

func testMisaligned(t *testing.T, s *subject) {
	want := s.random(4 * s.lb)
	s.write(t, want, 0)
	s.refused(t, block.ErrMisaligned, 1, s.lb)
	s.refused(t, block.ErrMisaligned, s.lb/2, s.lb)
	s.refused(t, block.ErrMisaligned, 0, s.lb-1)
	s.refused(t, block.ErrMisaligned, s.lb, s.lb+1)
	s.expect(t, want, 0)
}

func testWriteZeroes(t *testing.T, s *subject) {
	n := int64(64)
	want := s.random(n * s.lb)
	s.write(t, want, 0)
	for _, span := range [][2]int64{{1, 1}, {3, 17}, {24, 32}} { // in blocks; both within and across pages
		if err := s.dev.WriteZeroes(t.Context(), span[0]*s.lb, span[1]*s.lb); err != nil {
			t.Fatal(err)
		}
		clear(want[span[0]*s.lb : (span[0]+span[1])*s.lb])
		s.expect(t, want, 0)
	}
	again := s.random(2 * s.lb)
	s.write(t, again, 4*s.lb)
	copy(want[4*s.lb:], again)
	s.expect(t, want, 0)
}

func testDiscard(t *testing.T, s *subject) {
	want := s.random(64 * s.lb)
	s.write(t, want, 0)
	first, count := int64(9), int64(33)
	if err := s.dev.Discard(t.Context(), first*s.lb, count*s.lb); err != nil {
		t.Fatal(err)
	}
	s.read(t, first*s.lb, count*s.lb) // undefined content, but no error
	s.expect(t, want[:first*s.lb], 0)
	s.expect(t, want[(first+count)*s.lb:], (first+count)*s.lb)
	again := s.random(count * s.lb)
	s.write(t, again, first*s.lb)
	s.expect(t, again, first*s.lb)
}

func testCAWMatch(t *testing.T, s *subject) {
	u := int64(s.g.UnitBytes)
	want := s.random(3 * u)
	s.write(t, want, u)
	next := s.random(u)
	if err := s.dev.CompareAndWrite(t.Context(), 2*u, want[u:2*u], next); err != nil {
		t.Fatal(err)
	}
	copy(want[u:], next)
	s.expect(t, want, u)
	mem := make([]byte, 2*u+1) // unaligned memory for both halves
	copy(mem[1:], next)
	copy(mem[1+u:], s.random(u))
	if err := s.dev.CompareAndWrite(t.Context(), 2*u, mem[1:1+u], mem[1+u:]); err != nil {
		t.Fatal(err)
	}
	copy(want[u:], mem[1+u:])
	s.expect(t, want, u)
}

func testCAWMiscompare(t *testing.T, s *subject) {
	u := int64(s.g.UnitBytes)
	want := s.random(3 * u)
	s.write(t, want, 0)
	for _, wrongAt := range []int64{0, u / 2, u - 1} {
		compare := bytes.Clone(want[u : 2*u])
		compare[wrongAt] ^= 1
		err := s.dev.CompareAndWrite(t.Context(), u, compare, s.random(u))
		if !errors.Is(err, block.ErrMiscompare) {
			t.Fatalf("compare with byte %d wrong: %v, want %v", wrongAt, err, block.ErrMiscompare)
		}
		s.expect(t, want, 0)
	}
}

func testCAWMalformed(t *testing.T, s *subject) {
	u := s.g.UnitBytes
	want := s.random(int64(3 * u))
	s.write(t, want, 0)
	cur, next := want[:u], s.random(int64(2*u))
	for _, c := range []struct {
		name           string
		off            int64
		compare, write []byte
		want           error
	}{
		{"two units", 0, want[:2*u], next, block.ErrMisaligned},
		{"part of a unit", 0, cur[:u/2], next[:u/2], block.ErrMisaligned},
		{"unequal lengths", 0, cur, next[:u-1], block.ErrMisaligned},
		{"no bytes", 0, nil, nil, block.ErrMisaligned},
		{"odd offset", int64(u / 2), want[u/2 : u/2+u], next[:u], block.ErrMisaligned},
		{"past the end", s.g.SizeBytes / int64(u) * int64(u), cur, next[:u], block.ErrOutOfRange},
		{"before the start", -int64(u), cur, next[:u], block.ErrOutOfRange},
	} {
		if err := s.dev.CompareAndWrite(t.Context(), c.off, c.compare, c.write); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	s.expect(t, want, 0)
}

func testCancelled(t *testing.T, s *subject) {
	u := int64(s.g.UnitBytes)
	want := s.random(2 * u)
	s.write(t, want, 0)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	next := s.random(u)
	for name, err := range map[string]error{
		"ReadAt":          s.dev.ReadAt(ctx, block.AlignedBuffer(int(u)), 0),
		"WriteAt":         s.dev.WriteAt(ctx, next, 0),
		"WriteFUA":        s.dev.WriteFUA(ctx, next, 0),
		"Flush":           s.dev.Flush(ctx),
		"WriteZeroes":     s.dev.WriteZeroes(ctx, 0, u),
		"Discard":         s.dev.Discard(ctx, 0, u),
		"CompareAndWrite": s.dev.CompareAndWrite(ctx, 0, want[:u], next),
	} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s under a cancelled context: %v, want %v", name, err, context.Canceled)
		}
	}
	s.expect(t, want, 0)
}

func testConcurrent(t *testing.T, s *subject) {
	const workers, rounds = 8, 25
	span := s.g.SizeBytes / workers / s.lb * s.lb
	var wg sync.WaitGroup
	for w := range int64(workers) {
		rng := rand.New(rand.NewPCG(3, uint64(w)))
		wg.Go(func() {
			for range rounds {
				n := (1 + rng.Int64N(8)) * s.lb
				off := w*span + rng.Int64N((span-n)/s.lb)*s.lb
				p, back := block.AlignedBuffer(int(n)), block.AlignedBuffer(int(n))
				for i := range p {
					p[i] = byte(rng.Uint32())
				}
				if err := s.dev.WriteAt(t.Context(), p, off); err != nil {
					t.Error(err)
					return
				}
				if err := s.dev.Flush(t.Context()); err != nil {
					t.Error(err)
					return
				}
				if err := s.dev.ReadAt(t.Context(), back, off); err != nil {
					t.Error(err)
					return
				}
				if !bytes.Equal(back, p) {
					t.Errorf("worker %d: %d bytes at %d differ", w, n, off)
					return
				}
			}
		})
	}
	wg.Wait()
}

func testCAWCounter(t *testing.T, s *subject) {
	const workers, each = 4, 20
	s.write(t, block.AlignedBuffer(s.g.UnitBytes), 0)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			if err := Increment(t.Context(), s.dev, 0, each); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := binary.LittleEndian.Uint64(s.read(t, 0, int64(s.g.UnitBytes))); got != workers*each {
		t.Errorf("counter is %d after %d increments", got, workers*each)
	}
}

func testClose(t *testing.T, s *subject) {
	u := s.g.UnitBytes
	if err := s.dev.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
	p, q := block.AlignedBuffer(u), block.AlignedBuffer(u)
	for name, err := range map[string]error{
		"ReadAt":          s.dev.ReadAt(t.Context(), p, 0),
		"WriteAt":         s.dev.WriteAt(t.Context(), p, 0),
		"WriteFUA":        s.dev.WriteFUA(t.Context(), p, 0),
		"Flush":           s.dev.Flush(t.Context()),
		"WriteZeroes":     s.dev.WriteZeroes(t.Context(), 0, s.lb),
		"Discard":         s.dev.Discard(t.Context(), 0, s.lb),
		"CompareAndWrite": s.dev.CompareAndWrite(t.Context(), 0, p, q),
		"Close":           s.dev.Close(),
	} {
		if !errors.Is(err, block.ErrClosed) {
			t.Errorf("%s after Close: %v, want %v", name, err, block.ErrClosed)
		}
	}
}
