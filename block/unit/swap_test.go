package unit_test

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"basalt/block"
	"basalt/block/faultdev"
	"basalt/block/simdev"
	"basalt/block/unit"
)

var place = unit.Place{Volume: [16]byte{7}, OffBytes: 4096, Kind: unit.KindLock}

// desk is a LUN with one unit, seen by us through faults and by another host.
type desk struct {
	lun   *simdev.LUN
	other block.Device
	image []byte // as formatted
	nonce uint64
}

func newDesk(t *testing.T) *desk {
	d := &desk{lun: simdev.New(simdev.Options{SizeBytes: 1 << 20, LogicalBytes: 512})}
	d.other = d.lun.Host("other")
	d.image = make([]byte, 512)
	copy(d.image[unit.HeadBytes:], "first")
	place.Seal(d.image, unit.Head{Version: 1})
	if err := d.other.WriteFUA(t.Context(), d.image, place.OffBytes); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *desk) random() uint64 { d.nonce++; return d.nonce }

func (d *desk) host(rules ...faultdev.Rule) *faultdev.Device {
	return faultdev.New(d.lun.Host("us"), rules...)
}

func body(s string) []byte { return append([]byte(s), make([]byte, 512-unit.HeadBytes-len(s))...) }

// now reads the unit as it is on the LUN.
func (d *desk) now(t *testing.T) (string, unit.Head) {
	t.Helper()
	img, h, err := place.Read(t.Context(), d.other)
	if err != nil {
		t.Fatal(err)
	}
	return string(bytes.TrimRight(img[unit.HeadBytes:], "\x00")), h
}

func (d *desk) change(t *testing.T, s string) {
	t.Helper()
	img, _, err := place.Read(t.Context(), d.other)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := place.Swap(t.Context(), d.other, img, body(s), func() uint64 { return 1 << 40 }); err != nil {
		t.Fatal(err)
	}
}

func TestSwapChangesTheUnitByOneVersion(t *testing.T) {
	d := newDesk(t)
	res, err := place.Swap(t.Context(), d.host(), d.image, body("second"), d.random)
	if err != nil {
		t.Fatal(err)
	}
	s, h := d.now(t)
	if s != "second" || h.Version != 2 || h.Nonce != 1 {
		t.Fatalf("%q %+v", s, h)
	}
	if img, _, err := place.Read(t.Context(), d.other); err != nil || !bytes.Equal(img, res.Image) {
		t.Fatalf("%v: the result is not what is on the device", err)
	}
}

func TestSwapOfAnOldImageConflicts(t *testing.T) {
	d := newDesk(t)
	d.change(t, "theirs")
	res, err := place.Swap(t.Context(), d.host(), d.image, body("ours"), d.random)
	if !errors.Is(err, unit.ErrConflict) || res.Doubtful {
		t.Fatalf("%v, %+v", err, res)
	}
	if s, _ := d.now(t); s != "theirs" || !bytes.Contains(res.Image, []byte("theirs")) {
		t.Fatalf("%q", s)
	}
}

func TestSwapWhoseReplyIsLostHasSucceeded(t *testing.T) {
	d := newDesk(t)
	dev := d.host(faultdev.Rule{Ops: faultdev.CAW, Nth: 1, Effect: faultdev.FailAfter})
	if _, err := place.Swap(t.Context(), dev, d.image, body("second"), d.random); err != nil {
		t.Fatal(err)
	}
	if s, h := d.now(t); s != "second" || h.Version != 2 {
		t.Fatalf("%q %+v", s, h)
	}
	if got := d.lun.Stats().Flushes; got != 1 {
		t.Fatalf("%d flushes: nobody has said that it is durable", got)
	}
}

// R1: a command that seemed to have no effect may still be on its way. It is
// superseded, so that it cannot take effect after the caller has gone on.
func TestSwapThatLandsLateIsSuperseded(t *testing.T) {
	d := newDesk(t)
	dev := d.host(faultdev.Rule{Ops: faultdev.CAW, Nth: 1, Effect: faultdev.Late})
	res, err := place.Swap(t.Context(), dev, d.image, body("late"), d.random)
	if !errors.Is(err, unit.ErrNotExecuted) {
		t.Fatal(err)
	}
	if s, h := d.now(t); s != "first" || h.Version != 2 {
		t.Fatalf("%q %+v: not superseded", s, h)
	}
	if err := dev.Release(t.Context()); !errors.Is(err, block.ErrMiscompare) {
		t.Fatalf("the late command: %v", err)
	}
	if s, _ := d.now(t); s != "first" {
		t.Fatalf("%q: the late command took effect", s)
	}
	if _, err := place.Swap(t.Context(), dev, res.Image, body("again"), d.random); err != nil {
		t.Fatal(err)
	}
	if s, h := d.now(t); s != "again" || h.Version != 3 {
		t.Fatalf("%q %+v", s, h)
	}
}

// A late command may land between the read back and the superseding one.
func TestSwapThatLandsBeforeItIsSupersededHasSucceeded(t *testing.T) {
	d := newDesk(t)
	dev := d.host(faultdev.Rule{Ops: faultdev.CAW, Nth: 1, Effect: faultdev.Late})
	landing := &beforeCAW{Device: dev, nth: 2, do: func() {
		if err := dev.Release(t.Context()); err != nil {
			t.Error(err)
		}
	}}
	if _, err := place.Swap(t.Context(), landing, d.image, body("late"), d.random); err != nil {
		t.Fatal(err)
	}
	if s, h := d.now(t); s != "late" || h.Version != 2 {
		t.Fatalf("%q %+v", s, h)
	}
}

func TestSwapThatTookEffectAndWasChangedAgainIsDoubtful(t *testing.T) {
	d := newDesk(t)
	dev := &afterCAW{Device: d.host(faultdev.Rule{Ops: faultdev.CAW, Nth: 1, Effect: faultdev.FailAfter}), do: func() { d.change(t, "theirs") }}
	res, err := place.Swap(t.Context(), dev, d.image, body("ours"), d.random)
	if !errors.Is(err, unit.ErrConflict) || !res.Doubtful {
		t.Fatalf("%v, %+v", err, res)
	}
	if s, h := d.now(t); s != "theirs" || h.Version != 3 {
		t.Fatalf("%q %+v", s, h)
	}
}

// A transport that repeats a command whose reply it lost compares the second time
// with what the first has written.
func TestMiscompareWithOnesOwnContentIsSuccess(t *testing.T) {
	d := newDesk(t)
	dev := &repeating{Device: d.lun.Host("us")}
	if _, err := place.Swap(t.Context(), dev, d.image, body("second"), d.random); err != nil {
		t.Fatal(err)
	}
	if s, h := d.now(t); s != "second" || h.Version != 2 {
		t.Fatalf("%q %+v", s, h)
	}
}

func TestSwapWhoseOutcomeCannotBeReadIsUnknown(t *testing.T) {
	d := newDesk(t)
	dev := d.host(
		faultdev.Rule{Ops: faultdev.CAW, Nth: 1, Effect: faultdev.FailAfter},
		faultdev.Rule{Ops: faultdev.Read, Effect: faultdev.FailBefore},
	)
	_, err := place.Swap(t.Context(), dev, d.image, body("second"), d.random)
	if err == nil || errors.Is(err, unit.ErrConflict) || errors.Is(err, unit.ErrNotExecuted) {
		t.Fatal(err)
	}
}

func TestDeviceThatContradictsItselfIsDamaged(t *testing.T) {
	d := newDesk(t)
	dev := d.host(faultdev.Rule{Ops: faultdev.CAW, Effect: faultdev.FailBefore, Err: block.ErrMiscompare})
	_, err := place.Swap(t.Context(), dev, d.image, body("second"), d.random)
	if _, ok := errors.AsType[*block.CorruptError](err); !ok {
		t.Fatal(err)
	}
}

func TestRefusedCommandIsNotResolved(t *testing.T) {
	for _, refusal := range []error{block.ErrFenced, block.ErrClosed, block.ErrNotSupported} {
		d := newDesk(t)
		dev := d.host(faultdev.Rule{Ops: faultdev.CAW, Effect: faultdev.FailBefore, Err: refusal})
		reads := d.lun.Stats().Reads
		if _, err := place.Swap(t.Context(), dev, d.image, body("second"), d.random); !errors.Is(err, refusal) {
			t.Fatal(err)
		}
		if got := d.lun.Stats(); got.Reads != reads || got.CAWs != 0 {
			t.Fatalf("%v: %+v", refusal, got)
		}
	}
}

func TestUnitIsBoundToVolumeAddressAndKind(t *testing.T) {
	img := make([]byte, 512)
	copy(img[unit.HeadBytes:], "content")
	want := unit.Head{Version: 1 << 60, Nonce: 99}
	place.Seal(img, want)
	if got, err := place.Open(img); err != nil || got != want {
		t.Fatalf("%v, %+v", err, got)
	}
	elsewhere, foreign, other := place, place, place
	elsewhere.OffBytes += 4096
	foreign.Volume[0]++
	other.Kind = unit.KindIdentity
	for _, p := range []unit.Place{elsewhere, foreign, other} {
		if _, err := p.Open(img); err == nil {
			t.Errorf("opens at %+v", p)
		}
	}
	for i := range img {
		img[i] ^= 0x10
		if _, err := place.Open(img); err == nil {
			t.Errorf("opens with byte %d flipped", i)
		}
		img[i] ^= 0x10
	}
	if _, err := place.Open(img[:unit.HeadBytes-1]); err == nil {
		t.Error("opens when too short")
	}
}

type beforeCAW struct {
	block.Device
	nth, n int
	do     func()
}

func (d *beforeCAW) CompareAndWrite(ctx context.Context, offBytes int64, compare, write []byte) error {
	if d.n++; d.n == d.nth {
		d.do()
	}
	return d.Device.CompareAndWrite(ctx, offBytes, compare, write)
}

type afterCAW struct {
	block.Device
	do func()
}

func (d *afterCAW) CompareAndWrite(ctx context.Context, offBytes int64, compare, write []byte) error {
	err := d.Device.CompareAndWrite(ctx, offBytes, compare, write)
	if do := d.do; do != nil {
		d.do = nil
		do()
	}
	return err
}

type repeating struct{ block.Device }

func (d *repeating) CompareAndWrite(ctx context.Context, offBytes int64, compare, write []byte) error {
	if err := d.Device.CompareAndWrite(ctx, offBytes, compare, write); err != nil {
		return err
	}
	return d.Device.CompareAndWrite(ctx, offBytes, compare, write)
}
