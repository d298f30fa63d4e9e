package thinprov_test

import (
	"context"
	"errors"
	"testing"

	"basalt/thinprov"
)

// failNext lets the next operation that changes the volume fail without effect.
func (v *volume) failNext() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.ops, v.failAt = 0, 1
}

// land is the effect of an earlier write that failed.
func (v *volume) land(p []byte, off int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.put(p, off, false)
}

func TestFailedWriteThatLandsLateDoesNotChangeSnapshots(t *testing.T) {
	for _, logical := range []int{512, 4096} {
		v := newVolume(16)
		v.logical = logical
		r := newRig(t, v, self, 8<<20)
		content := pattern(1, 3<<20)
		r.write(0, content)
		// In several parts of the disk.
		late := map[int64][]byte{5 * page: pattern(2, page), 1<<20 - page: pattern(3, page), 2 << 20: pattern(4, 2*page)}
		for off, p := range late {
			v.failNext()
			if err := r.WriteAt(t.Context(), p, off); !errors.Is(err, errInjected) {
				t.Fatalf("write: %v", err)
			}
		}
		if _, err := r.Snapshot(t.Context(), "s", [16]byte{1}); err != nil {
			t.Fatal(err)
		}
		for off, p := range late {
			v.land(p, dataStart+off)
		}
		view, err := r.View(t.Context(), [16]byte{1})
		if err != nil {
			t.Fatal(err)
		}
		expect(t, view, 0, content)
		view.Close()
		expect(t, r, 0, content)
		got := v.cost(func() {
			if _, err := r.Snapshot(t.Context(), "t", [16]byte{2}); err != nil {
				t.Fatal(err)
			}
		})
		if got.reads != 0 {
			t.Errorf("the next snapshot looked at the same blocks again: %+v", got)
		}
		r.stop()
		checkClean(t, v, self)
		r.open()
		if view, err = r.View(t.Context(), [16]byte{1}); err != nil {
			t.Fatal(err)
		}
		expect(t, view, 0, content)
		view.Close()
		r.close()
		checkClean(t, v, self)
	}
}

func TestSnapshotIsRefusedWhileItsContentIsInDoubt(t *testing.T) {
	r, _, _ := fullRig(t)
	r.v.failNext()
	if err := r.WriteAt(t.Context(), pattern(2, page), 5*page); !errors.Is(err, errInjected) {
		t.Fatalf("write: %v", err)
	}
	if _, err := r.Snapshot(t.Context(), "s", [16]byte{1}); !errors.Is(err, thinprov.ErrNoSpace) {
		t.Fatalf("snapshot without room for a copy: %v", err)
	}
	if err := r.Discard(t.Context(), 5*page, page); err != nil { // nothing is in doubt any more
		t.Fatal(err)
	}
	if _, err := r.Snapshot(t.Context(), "s", [16]byte{1}); err != nil {
		t.Fatal(err)
	}
	r.close()
	checkClean(t, r.v, self)
}

// Only a write that the device was asked for can land late. Requests that end before
// cost no space, however many there are.
func TestGivenUpWritesCostNoSpace(t *testing.T) {
	r := newRig(t, newVolume(24), self, 16<<20)
	r.write(0, pattern(1, page))
	if _, err := r.Snapshot(t.Context(), "s", [16]byte{1}); err != nil {
		t.Fatal(err)
	}
	r.write(1<<20, make([]byte, 4<<20))
	before, err := r.Stat(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for i := range 100 {
		// The old content of the first block cannot be read.
		if err := r.WriteAt(ctx, pattern(2, 512<<10-sector), sector); !errors.Is(err, context.Canceled) {
			t.Fatalf("write %d: %v", i, err)
		}
	}
	after, err := r.Stat(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if after.FreeBytes != before.FreeBytes || after.SlabBytes != before.SlabBytes {
		t.Errorf("after 100 writes that wrote nothing %+v, before %+v", after, before)
	}
	r.close()
	checkClean(t, r.v, self)
}
