package thinprov

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"basalt/thinprov/layout"
)

// takeClaiming waits for the right to claim or release slabs; the result gives it
// back.
func (d *Disk) takeClaiming(ctx context.Context) (func(), error) {
	select {
	case d.claiming <- struct{}{}:
		return func() { <-d.claiming }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// growData claims slabs for data, unless another request has done so meanwhile. The
// more the disk has, the more it takes at once.
func (d *Disk) growData(ctx context.Context) error {
	d.mu.Lock()
	before := d.alloc.dataSlabs
	d.mu.Unlock()
	done, err := d.takeClaiming(ctx)
	if err != nil {
		return err
	}
	defer done()
	d.mu.Lock()
	now := d.alloc.dataSlabs
	d.mu.Unlock()
	if now > before {
		return nil
	}
	return d.grow(ctx, layout.SlabData, min(max(now/8, 1), MaxClaim), PurposeData)
}

// growTree claims slabs for at least n tree nodes.
func (d *Disk) growTree(ctx context.Context, n int, purpose Purpose) error {
	d.mu.Lock()
	before := d.alloc.freeTree
	d.mu.Unlock()
	done, err := d.takeClaiming(ctx)
	if err != nil {
		return err
	}
	defer done()
	d.mu.Lock()
	now, have := d.alloc.freeTree, len(d.alloc.tree)
	d.mu.Unlock()
	if now >= before+uint64(n) {
		return nil
	}
	slabs := (n + layout.BlocksPerSlab - 1) / layout.BlocksPerSlab
	return d.grow(ctx, layout.SlabTree, min(max(slabs, have/8, 1), MaxClaim), purpose)
}

// grow claims up to n slabs: the units that may change are logged durably before the
// claim, the slabs together with the first entry that uses them (R2). Needs
// claiming.
func (d *Disk) grow(ctx context.Context, kind layout.SlabKind, n int, purpose Purpose) error {
	if err := d.settleClaim(ctx); err != nil {
		return err
	}
	plan, err := d.store.PlanClaim(ctx, n, purpose)
	if err != nil {
		return fmt.Errorf("claim a slab: %w", err)
	}
	d.mu.Lock()
	b, err := d.logLocked(layout.Entry{Kind: layout.EntryClaim, Slab: kind, Units: plan.Units}, 0)
	d.mu.Unlock()
	if err != nil {
		return err
	}
	// From here on the claim runs to its end, whatever becomes of the request.
	if err := d.settled(d.background, b); err != nil {
		return err
	}
	slabs, err := d.store.Claim(d.background, plan)
	switch {
	case err == nil:
		return d.claimed(kind, slabs)
	case errors.Is(err, ErrNoSpace):
		return firstOf(d.claimed(kind, nil), fmt.Errorf("claim a slab: %w", err))
	}
	return firstOf(d.settleClaim(d.background), fmt.Errorf("claim a slab: %w", err))
}

// settleClaim learns what became of a claim whose outcome is open.
func (d *Disk) settleClaim(ctx context.Context) error {
	d.mu.Lock()
	c := d.claim
	d.mu.Unlock()
	if c == nil {
		return nil
	}
	slabs, err := d.store.Settle(ctx, c.units)
	if err != nil {
		return err
	}
	return d.claimed(c.kind, slabs)
}

// claimed takes slabs into the disk and closes the claim. Slabs that it has already,
// or that are on their way back, stay what they are.
func (d *Disk) claimed(kind layout.SlabKind, slabs []int64) error {
	slices.Sort(slabs)
	e := layout.Entry{Kind: layout.EntryClaimed, Slab: kind}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, at := range slabs {
		num := uint64(at) / SlabBytes
		if at <= 0 || at%SlabBytes != 0 {
			return d.failLocked(fmt.Errorf("the volume gave slab %d, which is no slab", at))
		}
		if d.alloc.slabs[num] == nil && !slices.Contains(d.releasing, num) {
			e.Slabs = append(e.Slabs, num)
		}
	}
	for len(e.Slabs) > layout.MaxReleasing { // settled units may hold many
		part := e
		part.Slabs = e.Slabs[:layout.MaxReleasing]
		if _, err := d.logLocked(part, 0); err != nil {
			return err
		}
		e.Slabs = e.Slabs[layout.MaxReleasing:]
	}
	_, err := d.logLocked(e, 0)
	return err
}

// emptySlabsLocked is how many data slabs hold nothing.
func (d *Disk) emptySlabsLocked() int { return d.alloc.lists[classEmpty].n }

// spareLocked is how many of them the disk keeps for its next writes.
func (d *Disk) spareLocked() int { return min(1+d.alloc.dataSlabs/64, MaxClaim) }

// releaseEmpty gives slabs back that hold nothing: the release is logged durably,
// the slabs are discarded, and only then is their tag cleared (R2).
func (d *Disk) releaseEmpty(ctx context.Context) error {
	done, err := d.takeClaiming(ctx)
	if err != nil {
		return err
	}
	defer done()
	for {
		e := layout.Entry{Kind: layout.EntryRelease}
		d.mu.Lock()
		if d.releasing != nil || d.failed != nil {
			d.mu.Unlock()
			return nil // an open release ends when the disk is opened anew
		}
		spare := d.emptySlabsLocked() - d.spareLocked()
		touched := d.newTally()
		for s := d.alloc.lists[classEmpty].tail; s != nil && spare > 0 && len(e.Slabs) < MaxRelease && !touched.full(); s = s.prev {
			e.Slabs = append(e.Slabs, s.num)
			touched.add(s.num*layout.BlocksPerSlab, 1)
			spare--
		}
		n := recordBytes(maxEntryBytes + openEntryBytes)
		if len(e.Slabs) == 0 || d.missingLocked(n, rankFree) != lackNothing {
			d.mu.Unlock()
			return nil
		}
		d.ring.promised += n
		b, err := d.logLocked(e, n)
		if b == nil {
			d.ring.promised -= n
		}
		d.mu.Unlock()
		if err == nil {
			err = d.settled(ctx, b)
		}
		if err == nil {
			err = d.giveBack(ctx, e.Slabs)
		}
		if err != nil {
			return err
		}
	}
}

// giveBack ends a logged release of slabs that are known to be the disk's. Once
// begun it is not cancelled: an UNMAP that is left behind may land when the slab is
// another's.
func (d *Disk) giveBack(ctx context.Context, nums []uint64) error {
	ctx = context.WithoutCancel(ctx)
	slabs := make([]int64, len(nums))
	for i, num := range nums {
		slabs[i] = int64(num) * SlabBytes
		if err := d.store.Discard(ctx, slabs[i], SlabBytes); err != nil {
			return fmt.Errorf("discard slab: %w", err)
		}
	}
	if len(slabs) > 0 {
		if err := d.store.Release(ctx, slabs); err != nil {
			return fmt.Errorf("release slabs: %w", err)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	_, err := d.logLocked(layout.Entry{Kind: layout.EntryReleased}, 0)
	return err
}

// finishRelease ends a release that the last opener began. Slabs whose tag was
// cleared may be another's by now and are not touched.
func (d *Disk) finishRelease(ctx context.Context) error {
	d.mu.Lock()
	nums := d.releasing
	d.mu.Unlock()
	if nums == nil {
		return nil
	}
	var units []uint32
	for _, num := range nums {
		if u := d.store.Unit(int64(num) * SlabBytes); !slices.Contains(units, u) {
			units = append(units, u)
		}
	}
	ours, err := d.store.Settle(ctx, units)
	if err != nil {
		return err
	}
	kept := slices.DeleteFunc(slices.Clone(nums), func(num uint64) bool { return !slices.Contains(ours, int64(num)*SlabBytes) })
	return d.giveBack(ctx, kept)
}
