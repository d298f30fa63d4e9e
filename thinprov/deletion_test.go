package thinprov_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
)

// A deletion is given up while its beginning is on its way to the log, and resumed.
// Until the beginning is durable a crash brings the snapshot back, so that the head
// must not write over it in place.
func TestSnapshotIsWholeUntilItsDeletionIsDurable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVolume(16)
		writes := &gate{}
		v.onWrite = func(off int64, _ int) { writes.pass(off) }
		r := newRig(t, v, self, 8<<20)
		r.write(0, pattern(1, 16*page))
		if _, err := r.Snapshot(t.Context(), "s", [16]byte{1}); err != nil {
			t.Fatal(err)
		}
		letGo := writes.shut(logStart, logEnd)
		var work sync.WaitGroup
		ctx, cancel := context.WithCancel(t.Context())
		work.Go(func() {
			if err := r.DeleteSnapshot(ctx, [16]byte{1}); !errors.Is(err, context.Canceled) {
				t.Errorf("delete: %v", err)
			}
		})
		synctest.Wait()
		cancel()
		synctest.Wait()
		work.Go(func() {
			if err := r.ResumeDeletion(t.Context()); err != nil {
				t.Errorf("resume: %v", err)
			}
		})
		synctest.Wait()
		work.Go(func() {
			if err := r.WriteAt(t.Context(), pattern(2, page), 0); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		after := v.clone() // a crash that loses nothing but the record
		other := &rig{t: t, v: after, ref: self, gen: r.gen}
		other.open()
		view, err := other.View(t.Context(), [16]byte{1})
		if err != nil {
			t.Fatal(err)
		}
		expect(t, view, 0, pattern(1, 16*page))
		view.Close()
		other.close()
		letGo()
		work.Wait()
		expect(t, r, 0, pattern(2, page))
		r.close()
		checkClean(t, v, self)
	})
}
