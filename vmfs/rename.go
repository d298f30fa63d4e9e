package vmfs

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

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
		err = v.mayMove(ctx, info.Ref, dst, to)
		if err == nil {
			err = v.renameLocked(ctx, move{info.Ref, src, dst, oldName, newName})
		}
		return errors.Join(err, l.release(ctx))
	}
	return v.renameLocked(ctx, move{info.Ref, src, dst, oldName, newName})
}

// move is one renaming, as its caller looked it up.
type move struct {
	ref              Ref // what moves
	src, dst         Ref // folders
	oldName, newName string
}

// mayMove refuses to move a folder below itself or too deep. The volume lock keeps
// other folders where they are meanwhile.
func (v *Volume) mayMove(ctx context.Context, moved, dst Ref, to string) error {
	if err := v.notBelow(ctx, dst, moved); err != nil {
		return err
	}
	names, err := SplitPath(to)
	if err != nil {
		return err
	}
	err = v.walk(ctx, moved, "", len(names), func(string, Info) error { return nil })
	if err != nil {
		return fmt.Errorf("%s: %w", to, err)
	}
	return nil
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
func (v *Volume) renameLocked(ctx context.Context, m move) (err error) {
	refs := []Ref{m.src}
	if m.dst != m.src {
		refs = append(refs, m.dst)
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
	return v.renameIn(ctx, open[m.src], open[m.dst], m)
}

// renameIn takes the three steps of a renaming. Before the second the new entry is
// stale, after it the old one is.
func (v *Volume) renameIn(ctx context.Context, from, to *folder, m move) error {
	here, err := from.all(ctx)
	if err != nil {
		return err
	}
	info, err := v.findIn(ctx, m.src, here, m.oldName)
	if err == nil && info.Ref != m.ref {
		err = ErrNotFound // another object has the name by now, of another kind perhaps
	}
	if err != nil {
		return fmt.Errorf("%q: %w", m.oldName, err)
	}
	there, err := v.vacant(ctx, to, m.newName)
	if err != nil {
		return err
	}
	// What an earlier attempt left under the new name would come true with the new
	// entry, as its twin.
	if err := v.sweep(ctx, to, there, m.newName); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	if err := to.add(ctx, Entry{Ref: info.Ref, Kind: info.Kind, Name: m.newName}); err != nil {
		return err
	}
	if err := v.changeIdentity(ctx, info.Ref.Slot, func(id *Identity) error {
		if id.State != StateLive || id.Incarnation != info.Ref.Incarnation {
			return fmt.Errorf("%q: %w", m.oldName, ErrNotFound)
		}
		id.Parent, id.Name = m.dst, m.newName
		return nil
	}); err != nil {
		return err // both entries stay: the identity tells which of them holds
	}
	return from.remove(ctx, info.Ref, m.oldName)
}
