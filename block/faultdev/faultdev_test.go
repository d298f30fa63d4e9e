package faultdev_test

import (
	"bytes"
	"context"
	"errors"
	"reflect"
	"testing"
	"testing/synctest"

	"basalt/block"
	"basalt/block/blocktest"
	"basalt/block/faultdev"
	"basalt/block/simdev"
)

var _ block.Device = (*faultdev.Device)(nil)

func TestConformanceWithoutRules(t *testing.T) {
	for _, logical := range []int{512, 4096} {
		opts := simdev.Options{LogicalBytes: logical}
		blocktest.Run(t, func(*testing.T) block.Device { return faultdev.New(simdev.New(opts).Host("a")) })
		blocktest.RunShared(t, func(*testing.T) func() block.Device {
			lun := simdev.New(opts)
			return func() block.Device { return faultdev.New(lun.Host("a")) }
		})
	}
}

const unit = 4096

func fill(blocks int, v byte) []byte { return bytes.Repeat([]byte{v}, blocks*unit) }

// pair is a faulty device and the healthy one beneath it, all blocks holding 9.
func pair(t *testing.T, rules ...faultdev.Rule) (faulty *faultdev.Device, beneath block.Device) {
	t.Helper()
	d := simdev.New(simdev.Options{SizeBytes: 1 << 20}).Host("a")
	if err := d.WriteFUA(t.Context(), fill(256, 9), 0); err != nil {
		t.Fatal(err)
	}
	return faultdev.New(d, rules...), d
}

// values are the first bytes of the first n blocks; each block must be uniform.
func values(t *testing.T, d block.Device, n int) []byte {
	t.Helper()
	p := make([]byte, n*unit)
	if err := d.ReadAt(context.Background(), p, 0); err != nil {
		t.Fatal(err)
	}
	var v []byte
	for b := range n {
		one := p[b*unit : (b+1)*unit]
		if !bytes.Equal(one, bytes.Repeat(one[:1], unit)) {
			t.Fatalf("block %d is torn within", b)
		}
		v = append(v, one[0])
	}
	return v
}

func wantValues(t *testing.T, d block.Device, want ...byte) {
	t.Helper()
	if got := values(t, d, len(want)); !bytes.Equal(got, want) {
		t.Errorf("blocks hold %v, want %v", got, want)
	}
}

func wantError(t *testing.T, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("error %v, want %v", got, want)
	}
}

// operations change the first block to 1, or to 0 where they can only clear.
var operations = []struct {
	op     faultdev.Ops
	result byte
	run    func(context.Context, block.Device) error
}{
	{faultdev.Write, 1, func(ctx context.Context, d block.Device) error { return d.WriteAt(ctx, fill(1, 1), 0) }},
	{faultdev.FUA, 1, func(ctx context.Context, d block.Device) error { return d.WriteFUA(ctx, fill(1, 1), 0) }},
	{faultdev.Zeroes, 0, func(ctx context.Context, d block.Device) error { return d.WriteZeroes(ctx, 0, unit) }},
	{faultdev.Discard, 0, func(ctx context.Context, d block.Device) error { return d.Discard(ctx, 0, unit) }},
	{faultdev.CAW, 1, func(ctx context.Context, d block.Device) error {
		return d.CompareAndWrite(ctx, 0, fill(1, 9), fill(1, 1))
	}},
}

func TestEffectsOnEachChange(t *testing.T) {
	mine := errors.New("mine")
	for _, op := range operations {
		for _, tt := range []struct {
			rule         faultdev.Rule
			err          error
			now, release byte // the first block right after the call, and after Release
		}{
			{faultdev.Rule{Effect: faultdev.FailBefore}, faultdev.ErrInjected, 9, 9},
			{faultdev.Rule{Effect: faultdev.FailBefore, Err: mine}, mine, 9, 9},
			{faultdev.Rule{Effect: faultdev.FailAfter}, faultdev.ErrInjected, op.result, op.result},
			{faultdev.Rule{Effect: faultdev.Late, Err: mine}, mine, 9, op.result},
			{faultdev.Rule{Effect: faultdev.Lost}, nil, 9, 9},
		} {
			t.Run(op.op.String()+" "+tt.rule.Effect.String(), func(t *testing.T) {
				d, beneath := pair(t, tt.rule)
				wantError(t, op.run(t.Context(), d), tt.err)
				wantValues(t, beneath, tt.now, 9)
				if err := d.Release(t.Context()); err != nil {
					t.Errorf("release: %v", err)
				}
				wantValues(t, beneath, tt.release, 9)
				want := []faultdev.Injection{{Effect: tt.rule.Effect, Op: op.op, Span: block.Range{LenBytes: unit}}}
				if got := d.Injections(); !reflect.DeepEqual(got, want) {
					t.Errorf("log %v, want %v", got, want)
				}
			})
		}
	}
}

func TestMisdirectedChangesLandElsewhere(t *testing.T) {
	for _, op := range operations {
		d, beneath := pair(t, faultdev.Rule{Ops: op.op, Effect: faultdev.Misdirect, ToBytes: 2 * unit})
		wantError(t, op.run(t.Context(), d), nil)
		wantValues(t, beneath, 9, 9, op.result, 9)
	}
}

func TestMisdirectedReadReturnsOtherBytes(t *testing.T) {
	d, beneath := pair(t, faultdev.Rule{Ops: faultdev.Read, Nth: 1, Effect: faultdev.Misdirect, ToBytes: 3 * unit})
	wantError(t, beneath.WriteAt(t.Context(), fill(1, 4), 3*unit), nil)
	wantValues(t, d, 4)
	wantValues(t, d, 9, 9, 9, 4)
}

func TestTornWriteKeepsItsFirstBlocks(t *testing.T) {
	d, beneath := pair(t,
		faultdev.Rule{Ops: faultdev.Write, Nth: 1, Effect: faultdev.Torn, Blocks: 2},
		faultdev.Rule{Ops: faultdev.Write, Nth: 2, Effect: faultdev.Torn, Blocks: 1, Err: faultdev.ErrInjected},
		faultdev.Rule{Ops: faultdev.Zeroes, Effect: faultdev.Torn, Blocks: 100},
	)
	wantError(t, d.WriteAt(t.Context(), fill(4, 1), 0), nil)
	wantValues(t, beneath, 1, 1, 9, 9)
	wantError(t, d.WriteAt(t.Context(), fill(4, 2), 0), faultdev.ErrInjected)
	wantValues(t, beneath, 2, 1, 9, 9)
	wantError(t, d.WriteZeroes(t.Context(), 0, 3*unit), nil)
	wantValues(t, beneath, 0, 0, 0, 9)
}

func TestNthCountsOnlyWhatMeetsTheRule(t *testing.T) {
	d, beneath := pair(t, faultdev.Rule{Ops: faultdev.Write, Within: block.Range{OffBytes: unit, LenBytes: unit}, Nth: 2, Effect: faultdev.FailBefore})
	write := func(v byte, first, blocks int64) error {
		return d.WriteAt(t.Context(), fill(int(blocks), v), first*unit)
	}
	wantError(t, write(1, 0, 1), nil)                  // before the range
	wantError(t, write(1, 2, 1), nil)                  // after it
	wantError(t, d.WriteFUA(t.Context(), nil, 0), nil) // another operation
	wantError(t, write(1, -1, 1), block.ErrOutOfRange) // malformed
	wantError(t, write(2, 0, 2), nil)                  // the first
	wantError(t, write(3, 1, 2), faultdev.ErrInjected) // the second
	wantError(t, write(4, 1, 1), nil)                  // the third
	wantValues(t, beneath, 2, 4, 1, 9)
	if got := len(d.Injections()); got != 1 {
		t.Errorf("%d injections, want 1", got)
	}
}

func TestFirstDueRuleActsAndAllCount(t *testing.T) {
	first, second, each := errors.New("first"), errors.New("second"), errors.New("each")
	d, _ := pair(t,
		faultdev.Rule{Ops: faultdev.Flush, Nth: 1, Effect: faultdev.FailBefore, Err: first},
		faultdev.Rule{Ops: faultdev.Flush, Nth: 2, Effect: faultdev.FailBefore, Err: second},
		faultdev.Rule{Ops: faultdev.Flush, Effect: faultdev.FailBefore, Err: each},
	)
	for _, want := range []error{first, second, each, each} {
		wantError(t, d.Flush(t.Context()), want)
	}
}

func TestLyingCompareAndWrite(t *testing.T) {
	d, beneath := pair(t,
		faultdev.Rule{Nth: 1, Effect: faultdev.BlindCAW},
		faultdev.Rule{Ops: faultdev.CAW, Nth: 2, Effect: faultdev.Lost},
	)
	wantError(t, d.CompareAndWrite(t.Context(), 0, fill(1, 77), fill(1, 1)), nil)
	wantValues(t, beneath, 1)
	wantError(t, d.CompareAndWrite(t.Context(), 0, fill(1, 1), fill(1, 2)), nil)
	wantValues(t, beneath, 1)
	wantError(t, d.CompareAndWrite(t.Context(), 0, fill(1, 2), fill(1, 3)), block.ErrMiscompare)
}

func TestLostReplyDoesNotTellTheOutcome(t *testing.T) {
	d, beneath := pair(t, faultdev.Rule{Ops: faultdev.CAW, Effect: faultdev.FailAfter})
	err := d.CompareAndWrite(t.Context(), 0, fill(1, 77), fill(1, 1))
	if !errors.Is(err, faultdev.ErrInjected) || errors.Is(err, block.ErrMiscompare) {
		t.Errorf("error %v, want only %v", err, faultdev.ErrInjected)
	}
	wantValues(t, beneath, 9)
}

func TestLateCompareAndWriteComparesWhenItLands(t *testing.T) {
	d, beneath := pair(t, faultdev.Rule{Ops: faultdev.CAW, Nth: 1, Effect: faultdev.Late})
	wantError(t, d.CompareAndWrite(t.Context(), 0, fill(1, 9), fill(1, 1)), faultdev.ErrInjected)
	wantError(t, d.CompareAndWrite(t.Context(), 0, fill(1, 9), fill(1, 2)), nil)
	wantError(t, d.Release(t.Context()), block.ErrMiscompare)
	wantValues(t, beneath, 2)
}

func TestLateOperationsKeepTheirBytes(t *testing.T) {
	d, beneath := pair(t, faultdev.Rule{Ops: faultdev.Write | faultdev.CAW, Effect: faultdev.Late})
	compare, write := fill(1, 9), fill(1, 1)
	wantError(t, d.CompareAndWrite(t.Context(), 0, compare, write), faultdev.ErrInjected)
	wantError(t, d.WriteAt(t.Context(), write, unit), faultdev.ErrInjected)
	clear(compare) // the caller has its memory back
	clear(write)
	wantError(t, d.Release(t.Context()), nil)
	wantValues(t, beneath, 1, 1, 9)
}

func TestDelayedOperationsWaitForRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, beneath := pair(t, faultdev.Rule{Ops: faultdev.Write, Effect: faultdev.Delay})
		ctx, cancel := context.WithCancel(t.Context())
		stays, leaves := make(chan error, 1), make(chan error, 1)
		go func() { stays <- d.WriteAt(t.Context(), fill(1, 1), 0) }()
		go func() { leaves <- d.WriteAt(ctx, fill(1, 2), unit) }()
		wantError(t, d.AwaitHeld(t.Context(), 2), nil)
		wantValues(t, beneath, 9, 9)
		cancel()
		wantError(t, <-leaves, context.Canceled)
		if n := d.Held(); n != 1 {
			t.Errorf("%d operations held, want 1", n)
		}
		wantError(t, d.Release(t.Context()), nil)
		wantError(t, <-stays, nil)
		wantValues(t, beneath, 1, 9)
	})
}

func TestCloseEndsDelayedOperations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := pair(t, faultdev.Rule{Ops: faultdev.Write, Effect: faultdev.Delay})
		result := make(chan error, 1)
		go func() { result <- d.WriteAt(t.Context(), fill(1, 1), 0) }()
		wantError(t, d.AwaitHeld(t.Context(), 1), nil)
		wantError(t, d.Close(), nil)
		wantError(t, <-result, block.ErrClosed)
	})
}

func TestLogIsBounded(t *testing.T) {
	d, _ := pair(t, faultdev.Rule{Ops: faultdev.Flush, Effect: faultdev.Lost})
	for range 5000 {
		wantError(t, d.Flush(t.Context()), nil)
	}
	if got := len(d.Injections()); got != 4096 {
		t.Errorf("log of %d entries, want 4096", got)
	}
}
