package thinprov_test

import (
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
)

// What one connection writes and another reads, the other's flush makes durable,
// though the write has not been answered: a mapping whose record is on its way, and
// an overwrite that has taken effect.
func TestFlushMakesDurableWhatReadsShow(t *testing.T) {
	for name, held := range map[string]struct{ from, to, off int64 }{
		"new mapping":        {logStart, logEnd, 0},
		"overwrite in place": {dataStart, dataStart + slabSize, 512 << 10},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				v := newVolume(16)
				writes, landed := &gate{}, &gate{}
				v.onWrite = func(off int64, _ int) { writes.pass(off) }
				v.onWritten = func(off int64, _ int) { landed.pass(off) }
				r := newRig(t, v, self, 8<<20)
				r.write(512<<10, pattern(9, page))
				g := writes // the record does not land
				if held.from == dataStart {
					g = landed // the data does, but the answer is late
				}
				letGo := g.shut(held.from, held.to)
				var work sync.WaitGroup
				work.Go(func() {
					if err := r.WriteAt(t.Context(), pattern(1, page), held.off); err != nil {
						t.Error(err)
					}
				})
				synctest.Wait()
				expect(t, r, held.off, pattern(1, page))
				flushed := false
				work.Go(func() {
					if err := r.Flush(t.Context()); err != nil {
						t.Error(err)
					}
					flushed = true
				})
				synctest.Wait()
				after := v.clone()
				if flushed {
					after.crash(rand.New(rand.NewPCG(1, 1)))
					other := &rig{t: t, v: after, ref: self, gen: r.gen}
					other.open()
					expect(t, other, held.off, pattern(1, page))
					other.close()
				}
				letGo()
				work.Wait()
				if !flushed {
					t.Error("the flush never ended")
				}
				r.close()
			})
		})
	}
}
