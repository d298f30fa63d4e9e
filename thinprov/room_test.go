package thinprov_test

import (
	"errors"
	"testing"

	"basalt/thinprov"
)

// takeRest gives all free slabs of the volume to another object.
func (v *volume) takeRest() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for s := 1; s < len(v.tags); s++ {
		if v.tags[s] == (thinprov.Ref{}) {
			v.tags[s] = thinprov.Ref{Slot: 9, Incarnation: 1}
		}
	}
}

// Discards on a disk with a snapshot use up nodes. When no more can be had they are
// refused, but the snapshot can still be deleted, and that gives the nodes back.
func TestSnapshotCanBeDeletedOnAVolumeWithoutSpace(t *testing.T) {
	const slabs, written = 600, 6 << 30
	v := newVolume(slabs)
	r := newRig(t, v, self, written)
	one := pattern(1, page)
	for off := int64(0); off < written; off += 64 << 10 { // an extent, and a place of its own, for each block
		r.write(off, one)
	}
	if _, err := r.Snapshot(t.Context(), "s", [16]byte{1}); err != nil {
		t.Fatal(err)
	}
	r.close()
	r.open()
	v.takeRest()
	var err error
	n := 0
	for off := int64(0); off < written && err == nil; off += 1 << 20 { // in every leaf of the map
		err = r.Discard(t.Context(), off, page)
		n++
	}
	if !errors.Is(err, thinprov.ErrNoSpace) {
		t.Fatalf("after %d discards: %v; the test is to run out of nodes", n, err)
	}
	if err := r.Checkpoint(t.Context()); err != nil {
		t.Fatalf("checkpoint: %v", err)
	}
	if err := r.DeleteSnapshot(t.Context(), [16]byte{1}); err != nil {
		t.Fatalf("delete: %v", err)
	}
	if err := r.Discard(t.Context(), 0, written); err != nil {
		t.Errorf("discard after the deletion: %v", err)
	}
	r.close()
	checkClean(t, v, self)
}
