package vmfs

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// Remove deletes an object that nobody else has locked and nobody depends on: LIVE
// → DYING, then its slabs, its entry and its slot. A folder must be empty. A crash
// at any step leaves a DYING object that the next change of its folder finishes.
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
	info, err := v.findIn(ctx, f.ref, entries, name)
	if err != nil {
		if errors.Is(err, ErrNotFound) {
			err = errors.Join(fmt.Errorf("%q: %w", name, err), v.sweep(ctx, f, entries))
		}
		return err
	}
	o, err := v.open(ctx, info.Ref, LockExclusive, NoWait)
	if err != nil {
		return err
	}
	err = v.mayRemove(ctx, o)
	if err == nil {
		err = v.bury(ctx, o)
	}
	if err == nil {
		err = f.remove(ctx, info.Ref, name)
	}
	return errors.Join(err, o.Close(ctx))
}

// mayRemove refuses what others need.
func (v *Volume) mayRemove(ctx context.Context, o *Object) error {
	if err := v.settleReference(ctx, o.ref); err != nil {
		return err
	}
	_, id, err := v.readIdentity(ctx, o.ref.Slot)
	if err != nil {
		return err
	}
	if id.Count > 0 {
		return fmt.Errorf("%q: %w: %d of its snapshots are published; remove their clones first", id.Name, ErrInUse, id.Count)
	}
	if o.kind != KindFolder {
		return nil
	}
	list, err := v.List(ctx, o.ref)
	if err != nil {
		return err
	}
	if len(list) > 0 {
		return fmt.Errorf("%q: %w: it holds %d objects", id.Name, ErrNotEmpty, len(list))
	}
	return nil
}

// bury ends the object's life: DYING, then its slabs go back, then its slot turns
// FREE and its reference on its origin goes. It may be repeated after a crash. The
// entry that is left is stale.
func (v *Volume) bury(ctx context.Context, o *Object) error {
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
	own, err := o.ownSlabs(ctx)
	if err != nil {
		return err
	}
	// DYING is the durable record of the release (R2).
	if err := v.unmap(ctx, own); err != nil {
		return err
	}
	if err := o.release(ctx, own); err != nil {
		return err
	}
	h, err := o.Header(ctx)
	if err != nil {
		return err
	}
	if h.Origin != (Ref{}) {
		if err := v.announceReference(ctx, h.Origin, o.ref, -1); err != nil {
			return err
		}
	}
	// The last tag is cleared: the slot may go.
	if err := v.changeIdentity(ctx, o.ref.Slot, func(id *Identity) error {
		if id.Incarnation == o.ref.Incarnation && id.State == StateDying {
			*id = Identity{State: StateFree, Incarnation: o.ref.Incarnation}
		}
		return nil
	}); err != nil {
		return err
	}
	if h.Origin != (Ref{}) {
		return v.settleReference(ctx, h.Origin)
	}
	return nil
}

// sweep finishes what crashes left in a folder that is locked for a change: it
// reaps DYING objects and drops entries whose identity disagrees.
func (v *Volume) sweep(ctx context.Context, f *folder, entries []Entry) error {
	for _, e := range entries {
		_, id, err := v.readIdentity(ctx, e.Ref.Slot)
		if err != nil {
			return err
		}
		same := id.Incarnation == e.Ref.Incarnation
		switch {
		case same && id.State == StateLive && id.Parent == f.ref && id.Name == e.Name:
			continue
		case same && id.State == StateDying && id.Parent == f.ref:
			if err := v.reap(ctx, e.Ref); err != nil {
				if errors.Is(err, ErrHeld) {
					continue // its remover is still at it
				}
				return err
			}
		}
		if err := f.remove(ctx, e.Ref, e.Name); err != nil {
			return err
		}
	}
	return nil
}

// reap buries a DYING object whose remover is dead.
func (v *Volume) reap(ctx context.Context, ref Ref) error {
	l, err := v.acquire(ctx, ref.Slot, LockExclusive, NoWait)
	if err != nil {
		return err
	}
	_, id, err := v.readIdentity(ctx, ref.Slot)
	if err == nil && id.State == StateDying && id.Incarnation == ref.Incarnation {
		err = v.bury(ctx, &Object{v: v, ref: ref, kind: id.Kind, lock: l})
	}
	return errors.Join(err, l.release(ctx))
}

// Rename moves an object to another name, in the same folder or another: the entry
// is added, then the identity changes, then the old entry goes (R4). An existing
// target is not replaced.
func (v *Volume) Rename(ctx context.Context, from, to string) error {
	if v.session == nil {
		return ErrReadOnly
	}
	src, oldName, err := v.parentOf(ctx, from)
	if err != nil {
		return err
	}
	dst, newName, err := v.parentOf(ctx, to)
	if err != nil {
		return err
	}
	info, err := v.find(ctx, src, oldName)
	if err != nil {
		return fmt.Errorf("%q: %w", from, err)
	}
	if info.Kind == KindFolder && src != dst {
		// The volume lock keeps two moves from tying folders into a ring.
		l, err := v.acquire(ctx, volumeSlot, LockExclusive, operation)
		if err != nil {
			return err
		}
		err = v.notBelow(ctx, dst, info.Ref)
		if err == nil {
			err = v.renameLocked(ctx, src, dst, oldName, newName)
		}
		return errors.Join(err, l.release(ctx))
	}
	return v.renameLocked(ctx, src, dst, oldName, newName)
}

// notBelow refuses to move a folder into itself.
func (v *Volume) notBelow(ctx context.Context, at, moved Ref) error {
	for range maxDepth {
		if at == moved {
			return fmt.Errorf("%w: a folder cannot move into itself", ErrName)
		}
		if at == rootRef {
			return nil
		}
		_, id, err := v.readIdentity(ctx, at.Slot)
		if err != nil {
			return err
		}
		at = id.Parent
	}
	return fmt.Errorf("%w: folders nest at most %d deep", ErrName, maxDepth)
}

// renameLocked locks the two folders in slot order.
func (v *Volume) renameLocked(ctx context.Context, src, dst Ref, oldName, newName string) (err error) {
	refs := []Ref{src}
	if dst != src {
		refs = append(refs, dst)
		slices.SortFunc(refs, func(a, b Ref) int { return int(a.Slot) - int(b.Slot) })
	}
	open := map[Ref]*folder{}
	for _, r := range refs {
		f, err := v.openFolder(ctx, r)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.Close(ctx)) }()
		open[r] = f
	}
	from, to := open[src], open[dst]
	there, err := to.all(ctx)
	if err != nil {
		return err
	}
	switch _, err := v.findIn(ctx, dst, there, newName); {
	case err == nil:
		return fmt.Errorf("%q: %w", newName, ErrExists)
	case !errors.Is(err, ErrNotFound):
		return err
	}
	here, err := from.all(ctx)
	if err != nil {
		return err
	}
	info, err := v.findIn(ctx, src, here, oldName)
	if err != nil {
		return fmt.Errorf("%q: %w", oldName, err)
	}
	if err := to.add(ctx, Entry{Ref: info.Ref, Kind: info.Kind, Name: newName}); err != nil {
		return err
	}
	if err := v.changeIdentity(ctx, info.Ref.Slot, func(id *Identity) error {
		if id.State != StateLive || id.Incarnation != info.Ref.Incarnation {
			return fmt.Errorf("%q: %w", oldName, ErrNotFound)
		}
		id.Parent, id.Name = dst, newName
		return nil
	}); err != nil {
		return err
	}
	return from.remove(ctx, info.Ref, oldName)
}
