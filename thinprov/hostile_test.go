package thinprov_test

import (
	"errors"
	"math/rand/v2"
	"testing"

	"basalt/block"
	"basalt/internal/clock"
	"basalt/thinprov"
	"basalt/thinprov/layout"
)

// hostileEntry is a well-formed entry that need not make sense.
func hostileEntry(rng *rand.Rand) layout.Entry {
	e := layout.Entry{
		Kind: layout.EntryKind(1 + rng.IntN(14)), Logical: rng.Uint64N(3000), Length: 1 + rng.Uint64N(600),
		Physical: 256*4 + rng.Uint64N(1500), Epoch: 1 + rng.Uint64N(3), UUID: [16]byte{byte(rng.Uint32())}, Name: "x",
		Slab: layout.SlabKind(1 + rng.IntN(3)), Units: []uint32{0}, Slabs: []uint64{1 + rng.Uint64N(12)},
		Ref: thinprov.Ref{Slot: 9}, SizeBytes: 8 << 20,
	}
	switch e.Kind {
	case layout.EntrySnapshot:
		e.Parent = rng.Uint64N(e.Epoch)
	case layout.EntryRelease:
		e.Slab = 0
	case layout.EntryDeleteStep:
		e.From, e.To = 0, []uint64{100, layout.MaxKeys}[rng.IntN(2)]
	}
	return e
}

// A log with intact checksums may still say anything: it is replayed if it makes
// sense, and refused as damage if it does not.
func TestSenselessLogIsRefusedNotObeyed(t *testing.T) {
	base := newVolume(32)
	var end int64
	base.onWrite = func(off int64, n int) {
		if off >= logStart && off < logEnd {
			end = off + int64(n)
		}
	}
	r := newRig(t, base, self, 8<<20)
	r.write(0, pattern(1, 1<<20))
	if _, err := r.Snapshot(t.Context(), "s", [16]byte{1}); err != nil {
		t.Fatal(err)
	}
	r.write(0, pattern(2, 100<<10))
	r.write(2<<20, pattern(2, 100<<10))
	r.stop()
	at := end - page
	prev, prevCRC, err := layout.Seed{Volume: base.id, Owner: self}.OpenRecord(base.visible(at / page)[:], at)
	if err != nil {
		t.Fatal(err)
	}
	accepted := 0
	for seed := range uint64(3000) {
		rng := rand.New(rand.NewPCG(seed, 11))
		v := base.clone()
		rec := make([]byte, page)
		var entries []byte
		for range 1 + rng.IntN(3) {
			entries = hostileEntry(rng).Append(entries)
		}
		copy(rec[layout.RecordHeadBytes:], entries)
		h := layout.RecordHead{LockGen: prev.LockGen, Seq: prev.Seq + 1, Prev: prevCRC, Used: len(entries)}
		layout.Seed{Volume: v.id, Owner: self}.SealRecord(rec, end, h)
		v.put(rec, end, true)
		rep, err := thinprov.Check(t.Context(), &object{v: v, ref: self})
		if err != nil {
			t.Fatalf("seed %d: check: %v", seed, err)
		}
		d, err := thinprov.Open(t.Context(), &object{v: v, ref: self, gen: 9}, clock.NewFake(), quiet(), thinprov.Options{})
		if err == nil {
			accepted++
			if err := d.Close(t.Context()); err != nil {
				t.Fatalf("seed %d: close: %v", seed, err)
			}
		} else if _, damage := errors.AsType[*block.CorruptError](err); !damage || !rep.Damaged() {
			t.Fatalf("seed %d: open: %v, check: %+v", seed, err, rep.Findings)
		}
	}
	if accepted == 0 || accepted == 3000 {
		t.Fatalf("%d of 3000 logs accepted", accepted)
	}
}

func TestDamageIsFoundByCheckAndByReads(t *testing.T) {
	v := newVolume(32)
	r := newRig(t, v, self, 8<<20)
	for i := range int64(400) { // several leaves
		r.write(i*2*page, pattern(byte(i), page))
	}
	r.close()
	rep := checkClean(t, v, self)
	if rep.Nodes < 5 {
		t.Fatalf("only %d nodes", rep.Nodes)
	}
	found := 0
	for k := range v.durable {
		if k < 3*slabSize/page || k >= 4*slabSize/page {
			continue
		}
		bad := v.clone()
		img := *v.durable[k]
		img[100] ^= 1
		bad.durable[k] = &img
		rep, err := thinprov.Check(t.Context(), &object{v: bad, ref: self})
		if err != nil {
			t.Fatal(err)
		}
		if rep.Damaged() {
			found++
		}
	}
	if found < rep.Nodes {
		t.Errorf("damage of %d nodes found, there are %d", found, rep.Nodes)
	}
}
