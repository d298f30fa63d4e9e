package vmfs_test

import (
	"bytes"
	"fmt"
	"testing"

	"basalt/block"
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
