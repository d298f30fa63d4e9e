package thinprov_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"basalt/block"
	"basalt/thinprov"
)

const (
	page     = 4096
	sector   = 512
	slabSize = thinprov.SlabBytes
	perUnit  = 122 // slabs whose tags one owner-table unit holds
)

var errStopped = errors.New("memory: host is dead")
var errInjected = errors.New("memory: injected failure")

// counts are the operations that reached the volume.
type counts struct{ reads, writes, fua, flushes, discards, headers, claims, releases int }

// volume is a device in memory with a volatile cache, and the owner table and
// headers of its objects. A page has one durable image and, until a flush, the
// images of the writes since.
type volume struct {
	mu      sync.Mutex
	id      [16]byte
	logical int
	durable map[int64]*[page]byte
	cached  map[int64][]*[page]byte // the last is what reads see
	tags    []thinprov.Ref          // by slab
	headers map[thinprov.Ref][2][]byte
	newest  map[thinprov.Ref]int // index of the newer header; -1 before the first
	reserve int                  // slabs kept for metadata
	counts  counts
	serial  atomic.Int32 // calls of methods that never overlap

	ops        int // operations so far that change something, or with countReads any
	countReads bool
	stopAt     int // from this operation on nothing has effect; 0: never
	stopTorn   *rand.Rand
	failAt     int // this operation fails without effect, once; 0: never
	loseHeader bool
	onWrite    func(off int64, n int) // called without mu, before a data or log write
	onWritten  func(off int64, n int) // called without mu, before the answer to one
	onRead     func(off int64, n int)
}

func newVolume(slabs int) *volume {
	return &volume{
		id: [16]byte{7, 7, 7}, logical: 512,
		durable: make(map[int64]*[page]byte), cached: make(map[int64][]*[page]byte),
		tags: make([]thinprov.Ref, slabs), headers: make(map[thinprov.Ref][2][]byte), newest: make(map[thinprov.Ref]int),
	}
}

// clone copies the volume as it is, cache included.
func (v *volume) clone() *volume {
	v.mu.Lock()
	defer v.mu.Unlock()
	c := newVolume(len(v.tags))
	c.logical, c.reserve = v.logical, v.reserve
	for k, p := range v.durable {
		c.durable[k] = p // images are never changed, only replaced
	}
	for k, p := range v.cached {
		c.cached[k] = slices.Clone(p)
	}
	copy(c.tags, v.tags)
	for k, h := range v.headers {
		c.headers[k] = h
		c.newest[k] = v.newest[k]
	}
	return c
}

// crash is a power failure: of the cached writes to a page each sector keeps the
// durable content or that of any write since. The volume can be used again.
func (v *volume) crash(rng *rand.Rand) {
	v.mu.Lock()
	defer v.mu.Unlock()
	pages := make([]int64, 0, len(v.cached))
	for k := range v.cached {
		pages = append(pages, k)
	}
	slices.Sort(pages)
	for _, k := range pages {
		images := append([]*[page]byte{v.image(v.durable[k])}, v.cached[k]...)
		out := new([page]byte)
		for s := 0; s < page; s += sector {
			copy(out[s:s+sector], images[rng.IntN(len(images))][s:])
		}
		v.durable[k] = out
	}
	clear(v.cached)
	v.revive()
}

// revive lets a volume whose host was stopped be used again.
func (v *volume) revive() { v.stopAt, v.failAt, v.ops, v.countReads = 0, 0, 0, false }

var zeroPage [page]byte

func (v *volume) image(p *[page]byte) *[page]byte {
	if p == nil {
		return &zeroPage
	}
	return p
}

func (v *volume) visible(k int64) *[page]byte {
	if c := v.cached[k]; len(c) > 0 {
		return c[len(c)-1]
	}
	return v.image(v.durable[k])
}

// step counts an operation and says whether it may take effect. Needs mu.
func (v *volume) step() error {
	v.ops++
	if v.stopAt > 0 && v.ops >= v.stopAt {
		return errStopped
	}
	if v.failAt > 0 && v.ops == v.failAt {
		return errInjected
	}
	return nil
}

func (v *volume) put(p []byte, off int64, durable bool) {
	for len(p) > 0 {
		k, in := off/page, off%page
		n := min(int64(len(p)), page-in)
		img := *v.visible(k)
		copy(img[in:in+n], p[:n])
		if !durable {
			v.cached[k] = append(v.cached[k], &img)
		} else if n == page {
			v.durable[k] = &img
			delete(v.cached, k)
		} else {
			base := *v.image(v.durable[k])
			copy(base[in:in+n], p[:n])
			v.durable[k] = &base
			for i, old := range v.cached[k] {
				next := *old
				copy(next[in:in+n], p[:n])
				v.cached[k][i] = &next
			}
		}
		p, off = p[n:], off+n
	}
}

// alone asserts that the methods that never overlap do not.
func (v *volume) alone() func() {
	if v.serial.Add(1) != 1 {
		panic("calls of the store overlap that must not")
	}
	runtime.Gosched()
	return func() { v.serial.Add(-1) }
}

// object is a Store on a volume.
type object struct {
	v   *volume
	ref thinprov.Ref
	gen uint64
}

func (o *object) Volume() [16]byte       { return o.v.id }
func (o *object) Self() thinprov.Ref     { return o.ref }
func (o *object) LockGeneration() uint64 { return o.gen }
func (o *object) Geometry() block.Geometry {
	return block.Geometry{SizeBytes: int64(len(o.v.tags)) * slabSize, LogicalBytes: o.v.logical, UnitBytes: o.v.logical}
}

func (o *object) check(p int, off int64) {
	if err := o.Geometry().Check(off, int64(p)); err != nil {
		panic(err)
	}
}

func (o *object) ReadAt(ctx context.Context, p []byte, off int64) error {
	o.check(len(p), off)
	if err := ctx.Err(); err != nil {
		return err
	}
	if o.v.onRead != nil {
		o.v.onRead(off, len(p))
	}
	o.v.mu.Lock()
	defer o.v.mu.Unlock()
	o.v.counts.reads++
	if o.v.countReads {
		if err := o.v.step(); err != nil {
			return err
		}
	}
	for len(p) > 0 {
		n := copy(p, o.v.visible(off / page)[off%page:])
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (o *object) write(p []byte, off int64, durable bool, count *int) error {
	o.check(len(p), off)
	if o.v.onWrite != nil {
		o.v.onWrite(off, len(p))
	}
	if o.v.onWritten != nil {
		defer o.v.onWritten(off, len(p))
	}
	o.v.mu.Lock()
	defer o.v.mu.Unlock()
	*count++
	// All of it lies in slabs of this object, or nothing does: the engine must never
	// write to what it does not own.
	for s := off / slabSize; s <= (off+int64(len(p))-1)/slabSize; s++ {
		if o.v.tags[s] != o.ref {
			panic(fmt.Sprintf("write of %d bytes at %d into slab %d, which belongs to %v", len(p), off, s, o.v.tags[s]))
		}
	}
	if err := o.v.step(); err != nil {
		if rng := o.v.stopTorn; rng != nil && o.v.ops == o.v.stopAt {
			for at := 0; at < len(p); at += sector { // the last write is torn
				if rng.IntN(2) == 0 {
					o.v.put(p[at:at+sector], off+int64(at), durable)
				}
			}
		}
		return err
	}
	o.v.put(p, off, durable)
	return nil
}

func (o *object) WriteAt(_ context.Context, p []byte, off int64) error {
	return o.write(p, off, false, &o.v.counts.writes)
}

func (o *object) WriteFUA(_ context.Context, p []byte, off int64) error {
	return o.write(p, off, true, &o.v.counts.fua)
}

func (o *object) Flush(context.Context) error {
	o.v.mu.Lock()
	defer o.v.mu.Unlock()
	o.v.counts.flushes++
	if err := o.v.step(); err != nil {
		return err
	}
	for k, c := range o.v.cached {
		o.v.durable[k] = c[len(c)-1]
	}
	clear(o.v.cached)
	return nil
}

// Discard fills the range with rubbish: what it reads as is undefined.
func (o *object) Discard(_ context.Context, off, n int64) error {
	rubbish := bytes.Repeat([]byte{0xdc}, int(n))
	return o.write(rubbish, off, false, &o.v.counts.discards)
}

func (o *object) ReadHeader(context.Context) ([]byte, error) {
	o.v.mu.Lock()
	defer o.v.mu.Unlock()
	h, found := o.v.headers[o.ref]
	if !found {
		return nil, thinprov.ErrNoHeader
	}
	return slices.Clone(h[o.v.newest[o.ref]]), nil
}

func (o *object) WriteHeader(_ context.Context, p []byte) error {
	defer o.v.alone()()
	o.v.mu.Lock()
	defer o.v.mu.Unlock()
	o.v.counts.headers++
	if err := o.v.step(); err != nil {
		return err
	}
	if o.v.loseHeader {
		return nil
	}
	h, at := o.v.headers[o.ref], 0
	if _, found := o.v.newest[o.ref]; found {
		at = 1 - o.v.newest[o.ref]
	}
	h[at] = slices.Clone(p)
	o.v.headers[o.ref], o.v.newest[o.ref] = h, at
	return nil
}

func (o *object) Unit(slab int64) uint32 { return uint32(slab / slabSize / perUnit) }

func (o *object) free(purpose thinprov.Purpose) []int64 {
	var out []int64
	for s := 1; s < len(o.v.tags); s++ {
		if o.v.tags[s] == (thinprov.Ref{}) {
			out = append(out, int64(s)*slabSize)
		}
	}
	if purpose == thinprov.PurposeData {
		out = out[:max(len(out)-o.v.reserve, 0)]
	}
	return out
}

func (o *object) PlanClaim(_ context.Context, n int, purpose thinprov.Purpose) (thinprov.Plan, error) {
	defer o.v.alone()()
	o.v.mu.Lock()
	defer o.v.mu.Unlock()
	free := o.free(purpose)
	if len(free) == 0 {
		return thinprov.Plan{}, thinprov.ErrNoSpace
	}
	p := thinprov.Plan{Slabs: free[:min(n, len(free))], Purpose: purpose}
	for _, s := range p.Slabs {
		if u := o.Unit(s); !slices.Contains(p.Units, u) {
			p.Units = append(p.Units, u)
		}
	}
	return p, nil
}

func (o *object) Claim(_ context.Context, p thinprov.Plan) ([]int64, error) {
	defer o.v.alone()()
	o.v.mu.Lock()
	defer o.v.mu.Unlock()
	o.v.counts.claims++
	if err := o.v.step(); err != nil {
		if o.v.stopTorn != nil && o.v.stopTorn.IntN(2) == 0 || errors.Is(err, errInjected) {
			for _, s := range p.Slabs { // it took effect, and nobody heard
				o.v.tags[s/slabSize] = o.ref
			}
		}
		return nil, err
	}
	for _, s := range p.Slabs {
		o.v.tags[s/slabSize] = o.ref
	}
	return slices.Clone(p.Slabs), nil
}

func (o *object) Release(_ context.Context, slabs []int64) error {
	defer o.v.alone()()
	o.v.mu.Lock()
	defer o.v.mu.Unlock()
	o.v.counts.releases++
	err := o.v.step()
	for _, s := range slabs {
		if o.v.tags[s/slabSize] == o.ref && (err == nil || o.v.stopTorn != nil && o.v.stopTorn.IntN(2) == 0) {
			o.v.tags[s/slabSize] = thinprov.Ref{}
		}
	}
	return err
}

func (o *object) Settle(_ context.Context, units []uint32) ([]int64, error) {
	defer o.v.alone()()
	o.v.mu.Lock()
	defer o.v.mu.Unlock()
	if o.v.stopAt > 0 && o.v.ops >= o.v.stopAt {
		return nil, errStopped
	}
	var out []int64
	for s, tag := range o.v.tags {
		if tag == o.ref && slices.Contains(units, o.Unit(int64(s)*slabSize)) {
			out = append(out, int64(s)*slabSize)
		}
	}
	return out, nil
}

// owned are the slabs that the owner table gives to ref.
func (v *volume) owned(ref thinprov.Ref) []int64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	var out []int64
	for s, tag := range v.tags {
		if tag == ref {
			out = append(out, int64(s)*slabSize)
		}
	}
	return out
}

// checkClean fails the test unless the disk of ref is consistent, and believes to
// own what the owner table says.
func checkClean(t testing.TB, v *volume, ref thinprov.Ref) thinprov.Report {
	t.Helper()
	r, err := thinprov.Check(t.Context(), &object{v: v, ref: ref})
	if err != nil {
		t.Fatalf("check: %v", err)
	}
	for _, f := range r.Findings {
		t.Errorf("check of %v: %v at %d: %s", ref, f.Severity, f.OffBytes, f.Text)
	}
	owned := v.owned(ref)
	for _, s := range r.Slabs {
		if !slices.Contains(owned, s) {
			t.Errorf("check of %v: the disk believes to own slab %d", ref, s)
		}
	}
	o := &object{v: v, ref: ref}
	for _, s := range owned {
		if !slices.Contains(r.Slabs, s) && !slices.Contains(r.Releasing, s) && !slices.Contains(r.Claiming, o.Unit(s)) {
			t.Errorf("check of %v: slab %d is leaked", ref, s)
		}
	}
	return r
}
