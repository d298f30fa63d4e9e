package vmfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"basalt/block"
	"basalt/block/unit"
)

// selfTestTries bounds the self-test's repetitions when other hosts test the same
// scratch unit.
const selfTestTries = 16

// selfTest proves on a scratch unit that the device executes compare-and-write
// honestly: a wrong compare must fail and change nothing, a right one must
// succeed and be seen. Without it two hosts would own one lock. ErrLyingDevice: it
// does not.
func (v *Volume) selfTest(ctx context.Context, dev block.Device) error {
	for range selfTestTries {
		p := v.place(unit.KindScratch, ScratchOff+int64(v.nonce()%ScratchUnits)*StrideBytes)
		conclusive, err := v.testUnit(ctx, dev, p)
		if conclusive || err != nil {
			return err
		}
	}
	return fmt.Errorf("vmfs: the mount self-test was disturbed %d times; try again", selfTestTries)
}

// testUnit is one round; it is inconclusive when the unit changes by another hand.
func (v *Volume) testUnit(ctx context.Context, dev block.Device, p unit.Place) (conclusive bool, err error) {
	was, head, err := p.Read(ctx, dev)
	if err != nil {
		return false, err
	}
	wrong, next := block.AlignedBuffer(len(was)), block.AlignedBuffer(len(was))
	p.Seal(wrong, unit.Head{Version: head.Version, Nonce: ^head.Nonce})
	p.Seal(next, unit.Head{Version: head.Version + 1, Nonce: v.nonce()})

	reread := func() ([]byte, error) {
		b := block.AlignedBuffer(len(was))
		return b, dev.ReadAt(ctx, b, p.OffBytes)
	}
	err = dev.CompareAndWrite(ctx, p.OffBytes, wrong, next)
	now, rerr := reread()
	if rerr != nil {
		return false, rerr
	}
	switch {
	case bytes.Equal(now, next):
		return false, fmt.Errorf("%w: it wrote although the compare was wrong", ErrLyingDevice)
	case err == nil:
		return false, fmt.Errorf("%w: it reported success for a wrong compare", ErrLyingDevice)
	case !errors.Is(err, block.ErrMiscompare):
		return false, fmt.Errorf("mount self-test: %w", err)
	case !bytes.Equal(now, was):
		return false, nil
	}
	err = dev.CompareAndWrite(ctx, p.OffBytes, was, next)
	now, rerr = reread()
	if rerr != nil {
		return false, rerr
	}
	switch {
	case err == nil && bytes.Equal(now, next):
		return true, nil
	case err == nil && bytes.Equal(now, was):
		return false, fmt.Errorf("%w: it reported success and wrote nothing", ErrLyingDevice)
	case errors.Is(err, block.ErrMiscompare) && bytes.Equal(now, was):
		return false, fmt.Errorf("%w: it reported a miscompare for a right compare", ErrLyingDevice)
	case err == nil || errors.Is(err, block.ErrMiscompare):
		return false, nil // another host's round came in between
	}
	return false, fmt.Errorf("mount self-test: %w", err)
}
