package blocktest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"testing"

	"basalt/block"
)

// RunShared tests that several handles act as hosts of one LUN. openShared makes
// a fresh LUN of at least MinBytes; each call of the function that it returns
// gives one more handle to that LUN. RunShared closes the handles.
func RunShared(t *testing.T, openShared func(t *testing.T) func() block.Device) {
	t.Run("HandlesReportSharedCompareAndWrite", func(t *testing.T) {
		d := handles(t, openShared, 1)[0]
		if !d.Geometry().SharedCAW {
			t.Error("Geometry.SharedCAW is not set on a shared LUN")
		}
	})
	t.Run("WritesAreVisibleToOtherHandlesAtOnce", func(t *testing.T) {
		testVisible(t, handles(t, openShared, 2))
	})
	t.Run("CompareAndWriteOfOneHandleFailsAnother", func(t *testing.T) {
		testStaleCompare(t, handles(t, openShared, 2))
	})
	t.Run("CompareAndWriteAcrossHandlesLosesNoIncrement", func(t *testing.T) {
		testSharedCounter(t, handles(t, openShared, 3))
	})
	t.Run("NeighbouringUnitsDoNotDisturbEachOther", func(t *testing.T) {
		testNeighbourUnits(t, handles(t, openShared, 3))
	})
	t.Run("CloseOfOneHandleLeavesTheOthers", func(t *testing.T) {
		testCloseOne(t, handles(t, openShared, 2))
	})
}

func handles(t *testing.T, openShared func(t *testing.T) func() block.Device, n int) []block.Device {
	t.Helper()
	open := openShared(t)
	devs := make([]block.Device, n)
	for i := range devs {
		devs[i] = open()
		t.Cleanup(func() { devs[i].Close() })
	}
	return devs
}

// Increment adds 1 to the little-endian uint64 at the start of the unit at
// offBytes n times, each by reading the unit and compare-and-write until one
// succeeds. The rest of the unit must keep its value.
func Increment(ctx context.Context, d block.Device, offBytes int64, n int) error {
	u := d.Geometry().UnitBytes
	cur, next := block.AlignedBuffer(u), block.AlignedBuffer(u)
	for done := 0; done < n; {
		if err := d.ReadAt(ctx, cur, offBytes); err != nil {
			return err
		}
		copy(next, cur)
		binary.LittleEndian.PutUint64(next, binary.LittleEndian.Uint64(cur)+1)
		err := d.CompareAndWrite(ctx, offBytes, cur, next)
		switch {
		case err == nil:
			done++
		case !errors.Is(err, block.ErrMiscompare):
			return err
		}
	}
	return nil
}

func fill(n int, v byte) []byte {
	b := block.AlignedBuffer(n)
	for i := range b {
		b[i] = v
	}
	return b
}

func mustRead(t *testing.T, d block.Device, offBytes int64, lenBytes int) []byte {
	t.Helper()
	p := block.AlignedBuffer(lenBytes)
	if err := d.ReadAt(t.Context(), p, offBytes); err != nil {
		t.Fatal(err)
	}
	return p
}

func testVisible(t *testing.T, devs []block.Device) {
	a, b := devs[0], devs[1]
	u := a.Geometry().UnitBytes
	for v := range byte(10) {
		want := fill(u, v+1)
		if err := a.WriteAt(t.Context(), want, 4096); err != nil {
			t.Fatal(err)
		}
		if got := mustRead(t, b, 4096, u); !bytes.Equal(got, want) {
			t.Fatalf("the other handle reads %#02x, want %#02x", got[0], want[0])
		}
		a, b = b, a
	}
	if err := a.WriteZeroes(t.Context(), 4096, int64(u)); err != nil {
		t.Fatal(err)
	}
	if got := mustRead(t, b, 4096, u); !bytes.Equal(got, fill(u, 0)) {
		t.Fatalf("the other handle reads %#02x after WriteZeroes", got[0])
	}
}

func testStaleCompare(t *testing.T, devs []block.Device) {
	a, b := devs[0], devs[1]
	u := a.Geometry().UnitBytes
	one, two, three := fill(u, 1), fill(u, 2), fill(u, 3)
	if err := a.WriteAt(t.Context(), one, 0); err != nil {
		t.Fatal(err)
	}
	if err := a.CompareAndWrite(t.Context(), 0, one, two); err != nil {
		t.Fatal(err)
	}
	if err := b.CompareAndWrite(t.Context(), 0, one, three); !errors.Is(err, block.ErrMiscompare) {
		t.Fatalf("compare with what the unit held before: %v, want %v", err, block.ErrMiscompare)
	}
	if got := mustRead(t, b, 0, u); !bytes.Equal(got, two) {
		t.Fatalf("unit reads %#02x, want 0x02", got[0])
	}
	if err := b.CompareAndWrite(t.Context(), 0, two, three); err != nil {
		t.Fatal(err)
	}
	if got := mustRead(t, a, 0, u); !bytes.Equal(got, three) {
		t.Fatalf("unit reads %#02x, want 0x03", got[0])
	}
}

func testSharedCounter(t *testing.T, devs []block.Device) {
	const workers, each = 2, 20 // per handle
	u := devs[0].Geometry().UnitBytes
	if err := devs[0].WriteAt(t.Context(), fill(u, 0), 0); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, d := range devs {
		for range workers {
			wg.Go(func() {
				if err := Increment(t.Context(), d, 0, each); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	want := uint64(len(devs) * workers * each)
	if got := binary.LittleEndian.Uint64(mustRead(t, devs[0], 0, u)); got != want {
		t.Errorf("counter is %d after %d increments", got, want)
	}
}

func testNeighbourUnits(t *testing.T, devs []block.Device) {
	const each = 40
	u := devs[0].Geometry().UnitBytes
	if err := devs[0].WriteAt(t.Context(), fill(u*len(devs), 0), 0); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i, d := range devs {
		wg.Go(func() {
			if err := Increment(t.Context(), d, int64(i*u), each); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for i := range devs {
		got := binary.LittleEndian.Uint64(mustRead(t, devs[0], int64(i*u), u))
		if got != each {
			t.Errorf("counter %d is %d, want %d", i, got, each)
		}
	}
}

func testCloseOne(t *testing.T, devs []block.Device) {
	u := devs[0].Geometry().UnitBytes
	want := fill(u, 7)
	if err := devs[0].WriteAt(t.Context(), want, 0); err != nil {
		t.Fatal(err)
	}
	if err := devs[0].Close(); err != nil {
		t.Fatal(err)
	}
	if got := mustRead(t, devs[1], 0, u); !bytes.Equal(got, want) {
		t.Errorf("unit reads %#02x, want 0x07", got[0])
	}
	next := fill(u, 8)
	if err := devs[1].CompareAndWrite(t.Context(), 0, want, next); err != nil {
		t.Fatal(err)
	}
	if got := mustRead(t, devs[1], 0, u); !bytes.Equal(got, next) {
		t.Errorf("unit reads %#02x, want 0x08", got[0])
	}
}
