package lease_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"basalt/block"
	"basalt/lease"
)

// deviceOps are all operations of a device that may change or tell something.
var deviceOps = map[string]func(ctx context.Context, d block.Device) error{
	"ReadAt":      func(ctx context.Context, d block.Device) error { return d.ReadAt(ctx, make([]byte, 512), dataOff) },
	"WriteAt":     func(ctx context.Context, d block.Device) error { return d.WriteAt(ctx, block512('1'), dataOff) },
	"WriteFUA":    func(ctx context.Context, d block.Device) error { return d.WriteFUA(ctx, block512('2'), dataOff) },
	"Flush":       func(ctx context.Context, d block.Device) error { return d.Flush(ctx) },
	"WriteZeroes": func(ctx context.Context, d block.Device) error { return d.WriteZeroes(ctx, dataOff+4096, 4096) },
	"Discard":     func(ctx context.Context, d block.Device) error { return d.Discard(ctx, dataOff+4096, 4096) },
	"CompareAndWrite": func(ctx context.Context, d block.Device) error {
		return d.CompareAndWrite(ctx, dataOff+8192, make([]byte, 512), make([]byte, 512))
	},
}

func TestEveryOperationPassesTheGate(t *testing.T) {
	for name, op := range deviceOps {
		t.Run(name, func(t *testing.T) {
			inSite(t, 2, func(t *testing.T, x *site) {
				a := x.machine("a")
				a.claim()
				if err := op(t.Context(), a.s.Device()); err != nil {
					t.Fatal(err)
				}
				a.dev.set(func(w *wire) { w.failBeats = true })
				x.tick(testLease + time.Second)
				held := x.start(func() error { return op(context.Background(), a.s.Device()) })
				before := a.changes()
				x.tick(time.Minute)
				if !pending(held) || a.changes() != before {
					t.Fatal("went past an expired lease")
				}
				b := x.machine("b")
				b.claim()
				if err := a.nexus.Fence(t.Context(), block.Holder{}); !errors.Is(err, block.ErrNotSupported) {
					t.Fatal(err)
				}
				if err := b.breakHost(a); err != nil {
					t.Fatal(err)
				}
				a.dev.set(func(w *wire) { w.failBeats = false })
				x.tick(2 * time.Second)
				if err := <-held; !errors.Is(err, lease.ErrLost) {
					t.Fatalf("held operation of a lost generation: %v", err)
				}
				if err := op(t.Context(), a.s.Device()); !errors.Is(err, lease.ErrLost) {
					t.Fatalf("operation of a lost generation: %v", err)
				}
			})
		})
	}
}

func TestMiscompareIsHeldLikeAnyAnswer(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a := x.machine("a")
		a.claim()
		hold := a.nexus.HoldWrites()
		caw := x.start(func() error {
			return a.s.Device().CompareAndWrite(context.Background(), dataOff, block512('?'), block512('!'))
		})
		a.dev.set(func(w *wire) { w.failBeats = true })
		x.tick(testLease + time.Second)
		hold.Release()
		x.tick(time.Second)
		if !pending(caw) {
			t.Fatal("told without a lease")
		}
		a.dev.set(func(w *wire) { w.failBeats = false })
		x.tick(2 * time.Second)
		if err := <-caw; !errors.Is(err, block.ErrMiscompare) {
			t.Fatal(err)
		}
	})
}

func TestClosingTheGateKeepsTheSlotAndTheDevice(t *testing.T) {
	inSite(t, 2, func(t *testing.T, x *site) {
		a := x.machine("a")
		a.claim()
		if err := a.s.Device().Close(); err != nil {
			t.Fatal(err)
		}
		for name, op := range deviceOps {
			if err := op(t.Context(), a.s.Device()); !errors.Is(err, block.ErrClosed) {
				t.Errorf("%s: %v", name, err)
			}
		}
		x.tick(20 * time.Second)
		if r := x.register(0); r.Phase != lease.Live || a.isLost() {
			t.Fatalf("register %+v", r)
		}
		if err := a.s.Close(t.Context()); err != nil || x.register(0).Phase != lease.Free {
			t.Fatalf("%v, register %+v", err, x.register(0))
		}
	})
}
