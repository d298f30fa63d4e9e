package vmfs

import (
	"context"
	"fmt"
	"slices"

	"basalt/block"
)

// Plan is a claim that has not been made: which slabs are wanted, and in which
// owner-table units their tags lie. The units are what an intent records.
type Plan struct {
	Units []uint32
	Slabs []int64 // slab numbers
}

// planUnits bounds the units of one plan, so that its intent fits in a header.
const planUnits = 8

// PlanClaim looks for n free slabs, as few runs as it finds. It changes nothing.
// metadata claims may use the volume's reserve. ErrNoSpace: not one is free. A plan
// may hold fewer than n.
func (v *Volume) PlanClaim(ctx context.Context, n int, metadata bool) (Plan, error) {
	v.mu.Lock()
	start := v.cursor
	v.mu.Unlock()
	groups := v.geo.groups()
	var p Plan
	// The first pass trusts what was seen full; the second asks again.
	for _, again := range []bool{false, true} {
		for i := range groups {
			g := (start + i) % groups
			if err := v.planGroup(ctx, g, n, metadata, again, &p); err != nil {
				return Plan{}, err
			}
			if len(p.Slabs) >= n || len(p.Units) >= planUnits {
				v.mu.Lock()
				v.cursor = g
				v.mu.Unlock()
				return p, nil
			}
		}
		if len(p.Slabs) > 0 {
			return p, nil
		}
	}
	return Plan{}, ErrNoSpace
}

func (v *Volume) planGroup(ctx context.Context, group int64, n int, metadata, again bool, p *Plan) error {
	per := uint32(v.geo.unitsPerGroup())
	for i := range per {
		u := uint32(group)*per + i
		v.mu.Lock()
		skip := v.full[u] && !again
		v.mu.Unlock()
		if skip || len(p.Slabs) >= n || len(p.Units) >= planUnits {
			continue
		}
		img, _, err := v.ownerPlace(u).Read(ctx, v.dev)
		if err != nil {
			return err
		}
		free := v.freeIn(u, img, metadata)
		v.mu.Lock()
		if len(free) == 0 {
			v.full[u] = true
		} else {
			delete(v.full, u)
		}
		v.mu.Unlock()
		if len(free) == 0 {
			continue
		}
		p.Units = append(p.Units, u)
		p.Slabs = append(p.Slabs, bestRun(free, n-len(p.Slabs))...)
	}
	return nil
}

// freeIn lists the free slabs of a unit, ascending.
func (v *Volume) freeIn(u uint32, img []byte, metadata bool) []int64 {
	var free []int64
	first, end := v.geo.unitSlabs(u)
	for s := first; s < end; s++ {
		if tagAt(img, int(s-first)) == 0 && (metadata || !v.geo.reserved(s)) {
			free = append(free, s)
		}
	}
	return free
}

// bestRun picks up to n slabs: the first run of n neighbours, else the lowest.
func bestRun(free []int64, n int) []int64 {
	for i := 0; i+n <= len(free); i++ {
		if free[i+n-1]-free[i] == int64(n-1) {
			return free[i : i+n]
		}
	}
	return free[:min(n, len(free))]
}

// Claim tags the plan's slabs with the object, or other slabs of the plan's units
// where those were taken meanwhile. It may get fewer than planned. The caller holds
// the object's exclusive lock and has logged the units as its intent (R2).
func (o *Object) Claim(ctx context.Context, p Plan, metadata bool) ([]int64, error) {
	if o.LockGeneration() == 0 {
		return nil, ErrReadOnly
	}
	v, tag := o.v, o.ref.tag()
	var got []int64
	for _, u := range p.Units {
		first, end := v.geo.unitSlabs(u)
		want := 0
		for _, s := range p.Slabs {
			if s >= first && s < end {
				want++
			}
		}
		// Tags that are ours already before the first attempt are not of this claim.
		var had map[int64]bool
		img, err := v.change(ctx, v.ownerPlace(u), func(img []byte) ([]byte, error) {
			if had == nil {
				had = ownIn(img, first, end, tag)
			}
			if len(ownIn(img, first, end, tag)) > len(had) {
				return nil, nil // an earlier attempt took effect and was then built upon
			}
			body, left := bodyOf(img), want
			pick := append(slices.Clone(p.Slabs), v.freeIn(u, img, metadata)...)
			for _, s := range pick {
				if left > 0 && s >= first && s < end && tagAt(img, int(s-first)) == 0 && !taken(body, int(s-first)) {
					setTag(body, int(s-first), tag)
					left--
				}
			}
			if left == want {
				return nil, nil
			}
			return body, nil
		})
		if err != nil {
			return got, err
		}
		for s := first; s < end; s++ {
			if tagAt(img, int(s-first)) == tag && !had[s] {
				got = append(got, s)
			}
		}
	}
	return got, nil
}

func taken(body []byte, index int) bool {
	return body[4*index]|body[4*index+1]|body[4*index+2]|body[4*index+3] != 0
}

func ownIn(img []byte, first, end int64, tag uint32) map[int64]bool {
	own := map[int64]bool{}
	for s := first; s < end; s++ {
		if tagAt(img, int(s-first)) == tag {
			own[s] = true
		}
	}
	return own
}

// Release clears the tags of the object's slabs. The caller holds the object's
// exclusive lock; all I/O on the slabs has ended, the release is durably logged,
// and their UNMAP has ended (R2). Slabs that are no longer the object's are left.
func (o *Object) Release(ctx context.Context, slabs []int64) error {
	if o.LockGeneration() == 0 {
		return ErrReadOnly
	}
	v, tag := o.v, o.ref.tag()
	byUnit := map[uint32][]int{}
	var units []uint32
	for _, s := range slabs {
		u, i := v.geo.unitOfSlab(s)
		if byUnit[u] == nil {
			units = append(units, u)
		}
		byUnit[u] = append(byUnit[u], i)
	}
	for _, u := range units {
		_, err := v.change(ctx, v.ownerPlace(u), func(img []byte) ([]byte, error) {
			body, changed := bodyOf(img), false
			for _, i := range byUnit[u] {
				if tagAt(img, i) == tag {
					setTag(body, i, 0)
					changed = true
				}
			}
			if !changed {
				return nil, nil
			}
			return body, nil
		})
		if err != nil {
			return err
		}
		v.mu.Lock()
		delete(v.full, u)
		v.mu.Unlock()
	}
	return nil
}

// Settle finishes what a crash left open in the given units: it raises the version
// of each, so that a compare-and-write of the dead holder can no longer take
// effect (R1), and returns the slabs in them that carry the object's tag.
func (o *Object) Settle(ctx context.Context, units []uint32) ([]int64, error) {
	if o.LockGeneration() == 0 {
		return nil, ErrReadOnly
	}
	v, tag := o.v, o.ref.tag()
	var own []int64
	for _, u := range units {
		if u >= v.geo.tableUnits() {
			return nil, fmt.Errorf("object %v: %w", o.ref, &block.CorruptError{
				Object: "intent", OffBytes: objectOff(o.ref.Slot), Reason: fmt.Sprintf("names owner-table unit %d of %d", u, v.geo.tableUnits())})
		}
		img, err := v.supersede(ctx, v.ownerPlace(u), func([]byte) (bool, error) { return true, nil })
		if err != nil {
			return nil, err
		}
		first, end := v.geo.unitSlabs(u)
		for s := first; s < end; s++ {
			if tagAt(img, int(s-first)) == tag {
				own = append(own, s)
			}
		}
	}
	return own, nil
}

// ownSlabs finds every slab that carries the object's tag by reading the whole
// owner table.
func (o *Object) ownSlabs(ctx context.Context) ([]int64, error) {
	var own []int64
	err := o.v.eachTag(ctx, func(slab int64, tag uint32) {
		if tag == o.ref.tag() {
			own = append(own, slab)
		}
	})
	return own, err
}

// eachTag reads the owner table, a group at a time, and calls f with every tag.
func (v *Volume) eachTag(ctx context.Context, f func(slab int64, tag uint32)) error {
	per := v.geo.unitsPerGroup()
	buf := block.AlignedBuffer(per * v.geo.unitBytes)
	for g := range v.geo.groups() {
		if err := v.dev.ReadAt(ctx, buf, groupOff(g)); err != nil {
			return fmt.Errorf("read owner table of group %d: %w", g, err)
		}
		for i := range per {
			u := uint32(g)*uint32(per) + uint32(i)
			img := buf[i*v.geo.unitBytes : (i+1)*v.geo.unitBytes]
			if _, err := v.ownerPlace(u).Open(img); err != nil {
				return err
			}
			first, end := v.geo.unitSlabs(u)
			for s := first; s < end; s++ {
				f(s, tagAt(img, int(s-first)))
			}
		}
	}
	return nil
}

// unmap tells the device that slabs are unused, in runs.
func (v *Volume) unmap(ctx context.Context, slabs []int64) error {
	sorted := slices.Sorted(slices.Values(slabs))
	for i := 0; i < len(sorted); {
		j := i + 1
		for j < len(sorted) && sorted[j] == sorted[j-1]+1 {
			j++
		}
		if err := v.dev.Discard(ctx, SlabOff(sorted[i]), int64(j-i)*SlabBytes); err != nil {
			return fmt.Errorf("unmap: %w", err)
		}
		i = j
	}
	return nil
}

// UnitOfSlab is the owner-table unit that holds a slab's tag.
func (v *Volume) UnitOfSlab(slab int64) uint32 {
	u, _ := v.geo.unitOfSlab(slab)
	return u
}
