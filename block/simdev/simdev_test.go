package simdev_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"basalt/block"
	"basalt/block/blocktest"
	"basalt/block/simdev"
)

var (
	_ block.Device = (*simdev.Handle)(nil)
	_ block.Fencer = (*simdev.Handle)(nil)
)

func TestConformance(t *testing.T) {
	for _, opts := range []simdev.Options{
		{LogicalBytes: 512},
		{LogicalBytes: 4096, DiscardGarbage: true, Seed: 7},
		{SizeBytes: 64 << 40},
		{LogicalBytes: 512, CacheBytes: 4096},
	} {
		t.Run(fmt.Sprintf("%+v", opts), func(t *testing.T) {
			blocktest.Run(t, func(*testing.T) block.Device { return simdev.New(opts).Host("a") })
			blocktest.RunShared(t, func(*testing.T) func() block.Device {
				lun := simdev.New(opts)
				return func() block.Device { return lun.Host("a") }
			})
		})
	}
}

func rng(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 1)) }

func fill(n int, v byte) []byte { return bytes.Repeat([]byte{v}, n) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, d block.Device, offBytes int64, n int) []byte {
	t.Helper()
	p := make([]byte, n)
	must(t, d.ReadAt(t.Context(), p, offBytes))
	return p
}

// crashValues counts, over many seeds, the first byte of the block at offBytes that
// a power failure leaves.
func crashValues(t *testing.T, lun *simdev.LUN, offBytes int64) map[byte]int {
	t.Helper()
	seen := make(map[byte]int)
	for seed := range uint64(200) {
		d := lun.CrashClone(rng(seed)).Host("after")
		seen[read(t, d, offBytes, 4096)[0]]++
	}
	return seen
}

func TestWriteIsVolatileUntilFlushed(t *testing.T) {
	lun := simdev.New(simdev.Options{})
	d := lun.Host("a")
	must(t, d.WriteAt(t.Context(), fill(4096, 1), 0))
	if seen := crashValues(t, lun, 0); seen[0] == 0 || seen[1] == 0 || len(seen) != 2 {
		t.Errorf("an unflushed write leaves %v, want sometimes 0 and sometimes 1", seen)
	}
	must(t, d.Flush(t.Context()))
	if seen := crashValues(t, lun, 0); len(seen) != 1 || seen[1] == 0 {
		t.Errorf("a flushed write leaves %v, want always 1", seen)
	}
}

func TestFlushByAnotherHostCoversAllWrites(t *testing.T) {
	lun := simdev.New(simdev.Options{})
	a, b := lun.Host("a"), lun.Host("b")
	must(t, a.WriteAt(t.Context(), fill(4096, 1), 0))
	must(t, b.Flush(t.Context()))
	if seen := crashValues(t, lun, 0); len(seen) != 1 || seen[1] == 0 {
		t.Errorf("power failure leaves %v, want always 1", seen)
	}
}

func TestDurableWritesOutliveOlderCachedOnes(t *testing.T) {
	for name, durable := range map[string]func(*testing.T, block.Device){
		"WriteFUA": func(t *testing.T, d block.Device) { must(t, d.WriteFUA(t.Context(), fill(4096, 3), 4096)) },
		"CompareAndWrite": func(t *testing.T, d block.Device) {
			must(t, d.CompareAndWrite(t.Context(), 4096, fill(4096, 2), fill(4096, 3)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			lun := simdev.New(simdev.Options{})
			d := lun.Host("a")
			must(t, d.WriteAt(t.Context(), fill(3*4096, 2), 0)) // volatile, around and beneath it
			durable(t, d)
			if seen := crashValues(t, lun, 4096); len(seen) != 1 || seen[3] == 0 {
				t.Errorf("power failure leaves %v, want always 3", seen)
			}
			if seen := crashValues(t, lun, 0); seen[0] == 0 || seen[2] == 0 {
				t.Errorf("the write beside it leaves %v, want 0 or 2: it is not durable", seen)
			}
		})
	}
}

func TestEveryVersionOfACachedBlockCanSurvive(t *testing.T) {
	lun := simdev.New(simdev.Options{})
	d := lun.Host("a")
	for v := range byte(3) {
		must(t, d.WriteAt(t.Context(), fill(4096, v+1), 0))
	}
	seen := crashValues(t, lun, 0)
	if len(seen) != 4 {
		t.Errorf("power failure leaves %v, want each of 0, 1, 2, 3", seen)
	}
}

func TestWritesTearAtLogicalBlocksOnly(t *testing.T) {
	const lb, blocks = 512, 16
	lun := simdev.New(simdev.Options{LogicalBytes: lb})
	must(t, lun.Host("a").WriteAt(t.Context(), fill(blocks*lb, 1), lb))
	torn := 0
	for seed := range uint64(100) {
		p := read(t, lun.CrashClone(rng(seed)).Host("after"), lb, blocks*lb)
		ones := 0
		for b := range blocks {
			one := p[b*lb : (b+1)*lb]
			switch {
			case bytes.Equal(one, fill(lb, 1)):
				ones++
			case !bytes.Equal(one, fill(lb, 0)):
				t.Fatalf("seed %d: block %d is torn within", seed, b)
			}
		}
		if ones > 0 && ones < blocks {
			torn++
		}
	}
	if torn < 10 {
		t.Errorf("%d of 100 power failures tore the write", torn)
	}
}

func TestZeroesAndDiscardsAreVolatileToo(t *testing.T) {
	lun := simdev.New(simdev.Options{})
	d := lun.Host("a")
	must(t, d.WriteFUA(t.Context(), fill(2*4096, 1), 0))
	must(t, d.WriteZeroes(t.Context(), 0, 4096))
	must(t, d.Discard(t.Context(), 4096, 4096))
	for _, off := range []int64{0, 4096} {
		if seen := crashValues(t, lun, off); seen[0] == 0 || seen[1] == 0 || len(seen) != 2 {
			t.Errorf("at %d power failure leaves %v, want 0 or 1", off, seen)
		}
	}
}

func TestCrashCloneLeavesTheOriginalAlone(t *testing.T) {
	lun := simdev.New(simdev.Options{})
	d := lun.Host("a")
	must(t, d.WriteAt(t.Context(), fill(4096, 1), 0))
	for seed := range uint64(20) {
		c := lun.CrashClone(rng(seed)).Host("after")
		must(t, c.WriteFUA(t.Context(), fill(4096, 9), 0))
		must(t, c.WriteFUA(t.Context(), fill(4096, 9), 8192))
	}
	if got := read(t, d, 0, 4096)[0]; got != 1 {
		t.Errorf("the original reads %d, want 1", got)
	}
	must(t, d.Flush(t.Context()))
	if got := read(t, d, 8192, 4096)[0]; got != 0 {
		t.Errorf("the original reads %d where only clones wrote", got)
	}
}

func TestCloneKeepsWhatIsCached(t *testing.T) {
	lun := simdev.New(simdev.Options{})
	must(t, lun.Host("a").WriteAt(t.Context(), fill(4096, 1), 0))
	clone := lun.Clone()
	must(t, lun.Host("b").WriteAt(t.Context(), fill(4096, 2), 0))
	if got := read(t, clone.Host("c"), 0, 4096)[0]; got != 1 {
		t.Errorf("the clone reads %d, want 1", got)
	}
	if seen := crashValues(t, clone, 0); seen[0] == 0 || seen[1] == 0 || len(seen) != 2 {
		t.Errorf("power failure of the clone leaves %v, want 0 or 1", seen)
	}
}

func TestCrashEndsAllHandles(t *testing.T) {
	lun := simdev.New(simdev.Options{})
	a, b := lun.Host("a"), lun.Host("b")
	must(t, a.WriteFUA(t.Context(), fill(4096, 1), 0))
	lun.Crash(rng(1))
	for _, d := range []block.Device{a, b} {
		if err := d.WriteAt(t.Context(), fill(4096, 2), 0); !errors.Is(err, block.ErrClosed) {
			t.Errorf("write on a handle from before: %v, want %v", err, block.ErrClosed)
		}
	}
	if got := read(t, lun.Host("a"), 0, 4096)[0]; got != 1 {
		t.Errorf("reads %d after the crash, want 1", got)
	}
}

func TestSameSeedSameCrash(t *testing.T) {
	image := func() []byte {
		lun := simdev.New(simdev.Options{SizeBytes: 1 << 20, LogicalBytes: 512, DiscardGarbage: true, Seed: 5})
		d := lun.Host("a")
		r := rng(11)
		for range 200 {
			off := r.Int64N(2000) * 512
			n := (1 + r.Int64N(40)) * 512
			switch r.IntN(8) {
			case 0:
				must(t, d.Discard(t.Context(), off, n))
			case 1:
				must(t, d.WriteZeroes(t.Context(), off, n))
			case 2:
				must(t, d.WriteFUA(t.Context(), fill(int(n), byte(r.Uint32())), off))
			default:
				must(t, d.WriteAt(t.Context(), fill(int(n), byte(r.Uint32())), off))
			}
		}
		lun.Crash(r)
		return read(t, lun.Host("b"), 0, 1<<20)
	}
	if !bytes.Equal(image(), image()) {
		t.Error("two runs with one seed differ")
	}
}

func TestCacheIsBounded(t *testing.T) {
	lun := simdev.New(simdev.Options{CacheBytes: 8 * 4096})
	d := lun.Host("a")
	const writes = 64
	for i := range int64(writes) {
		must(t, d.WriteAt(t.Context(), fill(4096, 1), i*4096))
	}
	if seen := crashValues(t, lun, 0); len(seen) != 1 || seen[1] == 0 {
		t.Errorf("the oldest write leaves %v, want always 1: it was written back", seen)
	}
	if seen := crashValues(t, lun, (writes-1)*4096); seen[0] == 0 {
		t.Errorf("the newest write leaves %v, want sometimes 0", seen)
	}
}

func TestHugeSparseDevice(t *testing.T) {
	lun := simdev.New(simdev.Options{SizeBytes: 64 << 40, DiscardGarbage: true})
	d := lun.Host("a")
	end := int64(64<<40) - 4096
	must(t, d.WriteAt(t.Context(), fill(4096, 1), end))
	must(t, d.WriteZeroes(t.Context(), 0, 64<<40))
	if got := read(t, d, end, 4096)[0]; got != 0 {
		t.Errorf("reads %d after zeroing the whole device", got)
	}
	must(t, d.Discard(t.Context(), 0, 64<<40))
	must(t, d.WriteFUA(t.Context(), fill(4096, 2), end))
	lun.Crash(rng(3))
	if got := read(t, lun.Host("b"), end, 4096)[0]; got != 2 {
		t.Errorf("reads %d, want 2", got)
	}
}

func TestGarbageDiscardDestroysContent(t *testing.T) {
	lun := simdev.New(simdev.Options{DiscardGarbage: true, Seed: 1})
	d := lun.Host("a")
	must(t, d.WriteAt(t.Context(), fill(4096, 1), 0))
	must(t, d.Discard(t.Context(), 0, 4096))
	if got := read(t, d, 0, 4096); bytes.Equal(got, fill(4096, 1)) || bytes.Equal(got, fill(4096, 0)) {
		t.Error("a discarded block kept its content or reads as zeros")
	}
}

func TestGrowShowsToOpenHandles(t *testing.T) {
	lun := simdev.New(simdev.Options{SizeBytes: 1 << 20})
	d := lun.Host("a")
	must(t, lun.Grow(2<<20))
	must(t, d.WriteAt(t.Context(), fill(4096, 1), 1<<20))
	if got := d.Geometry().SizeBytes; got != 2<<20 {
		t.Errorf("size %d, want %d", got, 2<<20)
	}
	if err := lun.Grow(1 << 20); !errors.Is(err, block.ErrNotSupported) {
		t.Errorf("shrinking: %v, want %v", err, block.ErrNotSupported)
	}
}

func TestOnChangeSeesEveryState(t *testing.T) {
	lun := simdev.New(simdev.Options{})
	d := lun.Host("a")
	var states []byte
	lun.OnChange(func(n int) {
		if n != len(states)+1 {
			t.Errorf("change %d after %d", n, len(states))
		}
		states = append(states, read(t, lun.Clone().Host("check"), 0, 4096)[0])
	})
	must(t, d.WriteAt(t.Context(), fill(4096, 1), 0))
	must(t, d.Flush(t.Context()))
	must(t, d.CompareAndWrite(t.Context(), 0, fill(4096, 1), fill(4096, 2)))
	read(t, d, 0, 4096)
	must(t, d.WriteZeroes(t.Context(), 0, 4096))
	if want := []byte{1, 1, 2, 0}; !bytes.Equal(states, want) {
		t.Errorf("states %v, want %v", states, want)
	}
}

func TestStatsCountWhatReachedTheLUN(t *testing.T) {
	lun := simdev.New(simdev.Options{})
	a, b := lun.Host("a"), lun.Host("b")
	must(t, a.WriteAt(t.Context(), fill(8192, 1), 0))
	must(t, b.WriteFUA(t.Context(), fill(4096, 1), 0))
	must(t, a.Flush(t.Context()))
	must(t, a.WriteZeroes(t.Context(), 0, 4096))
	must(t, a.Discard(t.Context(), 0, 4096))
	must(t, a.CompareAndWrite(t.Context(), 0, fill(4096, 0), fill(4096, 1)))
	if err := a.CompareAndWrite(t.Context(), 0, fill(4096, 0), fill(4096, 1)); !errors.Is(err, block.ErrMiscompare) {
		t.Fatal(err)
	}
	a.WriteAt(t.Context(), fill(4096, 1), -4096) // refused: not counted
	read(t, b, 0, 4096)

	wantA := simdev.Stats{Writes: 1, Flushes: 1, Zeroes: 1, Discards: 1, CAWs: 2, Miscompares: 1, WrittenBytes: 8192 + 4096}
	wantB := simdev.Stats{FUAs: 1, Reads: 1, ReadBytes: 4096, WrittenBytes: 4096}
	want := simdev.Stats{Reads: 1, Writes: 1, FUAs: 1, Flushes: 1, Zeroes: 1, Discards: 1, CAWs: 2, Miscompares: 1, ReadBytes: 4096, WrittenBytes: 16384}
	if got := a.Stats(); got != wantA {
		t.Errorf("host a: %+v, want %+v", got, wantA)
	}
	if got := b.Stats(); got != wantB {
		t.Errorf("host b: %+v, want %+v", got, wantB)
	}
	if got := lun.Stats(); got != want {
		t.Errorf("LUN: %+v, want %+v", got, want)
	}
	lun.ResetStats()
	if got := lun.Stats(); got != (simdev.Stats{}) || a.Stats() != (simdev.Stats{}) {
		t.Errorf("after the reset: %+v", got)
	}
}
