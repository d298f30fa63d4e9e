package vmfs

import (
	"context"
	"errors"
	"fmt"
)

// Remove deletes an object that nobody has locked and nobody depends on: LIVE →
// DYING, then its slabs, its slot and its entry. A folder must be empty. A crash at
// any step leaves a DYING object or a stale entry, which a later change of the
// folder finishes.
func (v *Volume) Remove(ctx context.Context, path string) error {
	if v.session == nil {
		return ErrReadOnly
	}
	parent, name, err := v.parentOf(ctx, path)
	if err != nil {
		return err
	}
	f, err := v.openFolder(ctx, parent)
	if err != nil {
		return err
	}
	return errors.Join(v.removeIn(ctx, f, name), f.Close(ctx))
}

func (v *Volume) removeIn(ctx context.Context, f *folder, name string) error {
	entries, err := f.all(ctx)
	if err != nil {
		return err
	}
	if err := v.sweep(ctx, f, entries, name); err != nil {
		return err
	}
	info, err := v.findIn(ctx, f.ref, entries, name)
	if err != nil {
		return fmt.Errorf("%q: %w", name, err)
	}
	wait := NoWait
	if info.Kind == KindFolder {
		wait = brief
	}
	o, err := v.open(ctx, info.Ref, LockExclusive, wait)
	if err != nil {
		return err
	}
	err = v.mayRemove(ctx, o)
	if err == nil {
		err = v.bury(ctx, o)
	}
	if err == nil {
		err = f.remove(context.WithoutCancel(ctx), info.Ref, name)
	}
	return errors.Join(err, o.Close(ctx))
}

// mayRemove refuses what others need, after it has finished what crashes left.
func (v *Volume) mayRemove(ctx context.Context, o *Object) error {
	if err := v.insist(ctx, o.ref); err != nil {
		return err
	}
	_, id, err := v.readIdentity(ctx, o.ref.Slot)
	if err != nil {
		return err
	}
	if id.Count > 0 && o.kind == KindDisk {
		snapshot := func(id *Identity) bool { return id.Kind == KindSnapshot && id.Parent == o.ref }
		if err := v.reapDying(ctx, snapshot); err != nil {
			return err
		}
		if _, id, err = v.readIdentity(ctx, o.ref.Slot); err != nil {
			return err
		}
	}
	if id.Count > 0 {
		return fmt.Errorf("%q: %w: %d of its snapshots are published; remove their clones first", id.Name, ErrInUse, id.Count)
	}
	if o.kind != KindFolder {
		return nil
	}
	f, err := loadFolder(ctx, o)
	if err != nil {
		return err
	}
	entries, err := f.all(ctx)
	if err != nil {
		return err
	}
	if err := v.sweepAll(ctx, f, entries); err != nil {
		return err
	}
	// Entries that stay are LIVE, damaged, or of a creation that goes on.
	if n := f.content.entries; n > 0 {
		return fmt.Errorf("%q: %w: it holds %d objects", id.Name, ErrNotEmpty, n)
	}
	return nil
}

// reapDying buries the DYING objects whose identities match and whose makers or
// removers are dead; a silent one is waited for, and broken.
func (v *Volume) reapDying(ctx context.Context, match func(*Identity) bool) error {
	groups, err := v.tableGroups(ctx)
	if err != nil {
		return err
	}
	for slot := range groups * ObjectsPerGroup {
		_, id, err := v.readIdentity(ctx, slot)
		if isDamage(err) {
			continue
		}
		if err != nil {
			return err
		}
		if id.State != StateDying || !match(id) {
			continue
		}
		l, err := v.acquire(ctx, slot, LockExclusive, NoWait)
		if errors.Is(err, ErrHeld) {
			continue // being made or removed at this moment
		}
		if err != nil {
			return err
		}
		if _, err := v.reapLocked(ctx, Ref{slot, id.Incarnation}, l); err != nil {
			return err
		}
	}
	return nil
}

// bury ends the object's life: DYING, then its slabs go back, then its slot turns
// FREE and its reference on its origin goes. It may be repeated after a crash. The
// entry that is left is stale. The caller holds the object's exclusive lock. Once
// begun it is not cancelled.
func (v *Volume) bury(ctx context.Context, o *Object) error {
	ctx = context.WithoutCancel(ctx)
	err := v.changeIdentity(ctx, o.ref.Slot, func(id *Identity) error {
		switch {
		case id.Incarnation != o.ref.Incarnation || id.State == StateFree:
			return fmt.Errorf("object %v: %w", o.ref, ErrNotFound)
		case id.State == StateLive && (id.Count > 0 || id.Pending.Delta != 0 || len(id.Holds) > 0):
			return fmt.Errorf("%q: %w", id.Name, ErrInUse)
		}
		id.State = StateDying
		return nil
	})
	if err != nil {
		return err
	}
	h, err := o.Header(ctx)
	if err != nil {
		return err
	}
	if o.kind != KindSnapshot {
		if err := o.freeSlabs(ctx, h.Intents); err != nil {
			return err
		}
	}
	// The last tag is cleared: the slot may go.
	end := func() error {
		return v.changeIdentity(ctx, o.ref.Slot, func(id *Identity) error {
			if id.Incarnation == o.ref.Incarnation && id.State == StateDying {
				*id = Identity{State: StateFree, Incarnation: o.ref.Incarnation}
			}
			return nil
		})
	}
	if h.Origin == (Ref{}) {
		return end()
	}
	return v.reference(ctx, h.Origin, o.ref, -1, end)
}

// freeSlabs returns every slab of a DYING object. Its identity is the durable
// record of the release (R2). Claims that a crash left open are settled first, so
// that none lands after the search (R1).
func (o *Object) freeSlabs(ctx context.Context, intents []uint32) error {
	if _, err := o.Settle(ctx, intents); err != nil {
		return err
	}
	own, err := o.ownSlabs(ctx)
	if err != nil {
		return err
	}
	if err := o.v.unmap(ctx, own); err != nil {
		return err
	}
	return o.Release(ctx, own)
}

// sweepEntries is how many entries each change of a folder looks at besides those
// of its own name.
const sweepEntries = 4

// sweep finishes what crashes left in a folder that is locked for a change: it
// reaps DYING objects and drops entries whose identity disagrees. After a dead
// host's change it looks at all entries, else at those of the name and a few at
// random, so that a change of a large folder stays cheap.
func (v *Volume) sweep(ctx context.Context, f *folder, entries []Entry, name string) error {
	if f.lock.before.Mode != LockFree {
		return v.sweepAll(ctx, f, entries)
	}
	for _, e := range entries {
		if e.Name == name {
			if err := v.sweepEntry(ctx, f, e); err != nil {
				return err
			}
		}
	}
	start := int(v.nonce() >> 33)
	for i := range min(sweepEntries, len(entries)) {
		e := entries[(start+i)%len(entries)]
		if e.Name == name {
			continue
		}
		if err := v.sweepEntry(ctx, f, e); err != nil {
			return err
		}
	}
	return nil
}

func (v *Volume) sweepAll(ctx context.Context, f *folder, entries []Entry) error {
	for _, e := range entries {
		if err := v.sweepEntry(ctx, f, e); err != nil {
			return err
		}
	}
	return nil
}

func (v *Volume) sweepEntry(ctx context.Context, f *folder, e Entry) error {
	_, id, err := v.readIdentity(ctx, e.Ref.Slot)
	if isDamage(err) {
		return nil // check reports it
	}
	if err != nil {
		return err
	}
	same := id.Incarnation == e.Ref.Incarnation && id.Parent == f.ref
	switch {
	case same && id.State == StateLive && id.Name == e.Name:
		return nil
	case same && id.State == StateDying:
		gone, err := v.reap(ctx, e.Ref)
		if err != nil || !gone {
			return err // not gone: whoever creates or removes it is still at it
		}
	}
	return f.remove(context.WithoutCancel(ctx), e.Ref, e.Name)
}

// reap buries a DYING object whose remover or creator is dead, and reports whether
// it is gone. An object that is too damaged for that stays.
func (v *Volume) reap(ctx context.Context, ref Ref) (bool, error) {
	l, err := v.tryAcquire(ctx, ref.Slot)
	if isDamage(err) {
		return false, nil
	}
	if err != nil || l == nil {
		return false, err
	}
	return v.reapLocked(ctx, ref, l)
}

// reapLocked buries a DYING object under its lock, and gives the lock up.
func (v *Volume) reapLocked(ctx context.Context, ref Ref, l *Lock) (bool, error) {
	_, id, err := v.readIdentity(ctx, ref.Slot)
	gone := err == nil && (id.State == StateFree || id.Incarnation != ref.Incarnation)
	if err == nil && !gone && id.State == StateDying {
		err = v.bury(ctx, &Object{v: v, ref: ref, kind: id.Kind, lock: l})
		gone = err == nil
		if isDamage(err) {
			err = nil
		}
	}
	return gone, errors.Join(err, l.release(ctx))
}
