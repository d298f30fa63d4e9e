package thinprov_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
)

// writeUntilStopped writes, discards and flushes in the cells' part of the disk, which
// begins at base, until an error. The cells tell afterwards what it may hold.
func writeUntilStopped(r *rig, rng *rand.Rand, base int64, cells []cell) {
	ctx := context.Background()
	next := uint32(base) // sectors of other writers never look alike
	for {
		at := rng.IntN(len(cells))
		n := min(1+rng.IntN(24), len(cells)-at)
		content := make([]uint32, n)
		p := make([]byte, n*sector)
		var err error
		switch rng.IntN(8) {
		case 0:
			if err = r.Flush(ctx); err == nil {
				for i := range cells {
					cells[i].durable()
				}
				continue
			}
			n = 0
		case 1:
			err = r.Discard(ctx, base+int64(at)*sector, int64(n)*sector)
		default:
			for i := range content {
				next++
				content[i] = next
			}
			fill(p, content)
			err = r.WriteAt(ctx, p, base+int64(at)*sector)
		}
		for i := range n {
			if err != nil {
				cells[at+i].maybe(content[i])
			} else {
				cells[at+i].set(content[i])
			}
		}
		if err != nil {
			return
		}
	}
}

// Writers at work, a snapshot coming and going and checkpoints running when the power
// fails: each sector is what was flushed, or something written since.
func TestPowerFailureUnderConcurrentRequests(t *testing.T) {
	seeds := uint64(200)
	if raceEnabled {
		seeds = 12
	}
	const part = 128 << 10
	for seed := range seeds {
		v := newVolume(48)
		r := newRig(t, v, self, 4*part)
		rng := rand.New(rand.NewPCG(seed, 12))
		v.mu.Lock()
		v.ops, v.stopAt, v.stopTorn = 0, 20+rng.IntN(600), rand.New(rand.NewPCG(seed, 13))
		v.mu.Unlock()
		var work sync.WaitGroup
		parts := make([][]cell, 4)
		for w := range parts {
			parts[w] = make([]cell, part/sector)
			own := rand.New(rand.NewPCG(seed, uint64(w)))
			work.Go(func() { writeUntilStopped(r, own, int64(w)*part, parts[w]) })
		}
		work.Go(func() {
			for i := byte(1); ; i++ {
				if _, err := r.Snapshot(context.Background(), fmt.Sprint(i), [16]byte{i, 1}); err != nil {
					return
				}
				if r.Checkpoint(context.Background()) != nil || r.DeleteSnapshot(context.Background(), [16]byte{i, 1}) != nil {
					return
				}
			}
		})
		work.Wait()
		_ = r.Close(t.Context())
		v.crash(rng)
		checkClean(t, v, self)
		r.open()
		p := make([]byte, part)
		for w, cells := range parts {
			if err := r.ReadAt(t.Context(), p, int64(w)*part); err != nil {
				t.Fatal(err)
			}
			for i, id := range ids(p) {
				if !cells[i].allows(id) {
					t.Fatalf("seed %d: sector %d of writer %d holds %d, want %d or one of %v", seed, i, w, id, cells[i].cur, cells[i].alts)
				}
			}
		}
		r.close()
		checkClean(t, v, self)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}
