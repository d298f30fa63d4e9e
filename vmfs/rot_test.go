package vmfs_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"testing"

	"basalt/block"
	"basalt/block/faultdev"
	"basalt/internal/clock"
	"basalt/vmfs"
)

// A header copy that rots takes no name and no content with it: the other one says
// the same.
func TestRottenHeaderCopyLosesNothing(t *testing.T) {
	lun := newLUN(t, 256<<20, 512)
	content := bytes.Repeat([]byte("basalt"), 5000)
	v := mount(t, lun, "a")
	for i := range 3 {
		if err := v.Mkdir(t.Context(), fmt.Sprintf("/d%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.Put(t.Context(), "/f", bytes.NewReader(content), nil); err != nil {
		t.Fatal(err)
	}
	file, err := v.Lookup(t.Context(), "/f")
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, slot := range []uint32{1, file.Ref.Slot} {
		for _, at := range []int64{headerAIn, headerAIn + vmfs.HeaderBytes} {
			lun := lun.Clone()
			dev := lun.Host("rot")
			if err := dev.WriteAt(t.Context(), block.AlignedBuffer(512), objectAt(slot)+at); err != nil {
				t.Fatal(err)
			}
			v := mount(t, lun, "b")
			root, err := v.Lookup(t.Context(), "/")
			if err != nil {
				t.Fatal(err)
			}
			if list, err := v.List(t.Context(), root.Ref); err != nil || len(list) != 4 {
				t.Errorf("object %d, header at %d: %d names, want 4 (%v)", slot, at, len(list), err)
			}
			var got bytes.Buffer
			if err := v.Get(t.Context(), "/f", &got, nil); err != nil || !bytes.Equal(got.Bytes(), content) {
				t.Errorf("object %d, header at %d: %d bytes read back, want %d (%v)", slot, at, got.Len(), len(content), err)
			}
			if err := v.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// A header write that was acknowledged and lost, and then one that is torn, leave the
// content of the write before both (R14).
func TestTornHeaderAfterALostOneKeepsTheOneBefore(t *testing.T) {
	lun := newLUN(t, 256<<20, 512)
	v := mount(t, lun, "a")
	o, err := v.Create(t.Context(), "/d", vmfs.New{Kind: vmfs.KindDisk, Payload: []byte("0")})
	if err != nil {
		t.Fatal(err)
	}
	slot := o.Ref().Slot
	if err := errors.Join(o.Close(t.Context()), v.Close(t.Context())); err != nil {
		t.Fatal(err)
	}
	h := lun.Host("b")
	headers := block.Range{OffBytes: objectAt(slot) + headerAIn, LenBytes: 2 * vmfs.HeaderBytes}
	dev := faultdev.New(h,
		faultdev.Rule{Ops: faultdev.FUA, Within: headers, Nth: 2, Effect: faultdev.Lost},
		faultdev.Rule{Ops: faultdev.FUA, Within: headers, Nth: 3, Effect: faultdev.Torn, Blocks: 1})
	w, err := vmfs.Mount(t.Context(), dev, h, clock.System{}, slog.New(slog.DiscardHandler), vmfs.MountOptions{HostName: "b", HostID: [16]byte{1}})
	if err != nil {
		t.Fatal(err)
	}
	info, err := w.Lookup(t.Context(), "/d")
	if err != nil {
		t.Fatal(err)
	}
	o, err = w.Open(t.Context(), info.Ref, vmfs.LockExclusive, vmfs.NoWait)
	if err != nil {
		t.Fatal(err)
	}
	for _, payload := range []string{"1", "2", "3"} {
		if err := o.PutHeader(t.Context(), vmfs.Header{Payload: []byte(payload)}); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(dev.Injections()); n != 2 {
		t.Fatalf("%d faults injected, want 2", n)
	}
	view, err := vmfs.View(t.Context(), lun.Host("c"), clock.System{})
	if err != nil {
		t.Fatal(err)
	}
	seen, err := view.OpenView(t.Context(), info.Ref)
	if err != nil {
		t.Fatal(err)
	}
	header, err := seen.Header(t.Context())
	if err != nil || string(header.Payload) != "1" {
		t.Errorf("the header that remains holds %q, want \"1\" (%v)", header.Payload, err)
	}
	h.Kill()
}
