package vmfs

import (
	"context"
	"errors"
	"fmt"
)

// A creation takes four steps, so that a crash at any of them leaves neither a name
// without content nor a slab that nobody will free:
//
//  1. the first header of the coming life goes into a free slot, under its lock;
//  2. the identity turns from FREE to DYING, with the next incarnation and the name,
//     and the origin of a clone counts it (R17);
//  3. the folder gets the entry, which readers take for stale;
//  4. Init gives the object its content, a flush makes that durable, and the identity
//     turns LIVE, under the folder's lock.
//
// When the creator dies its lock is free, and whoever changes the folder, or looks
// for a free slot, finds a DYING object and buries it.

// New describes an object to be created.
type New struct {
	Kind       Kind
	SizeBytes  int64
	Origin     Ref      // the published snapshot that a clone starts from
	OriginUUID [16]byte //
	Payload    []byte   // the first header's content
	// Init, if set, goes on from the first header, before anybody can see the object.
	// When it fails, or the host dies, the slabs that it claimed are freed.
	Init func(ctx context.Context, o *Object) error
}

// Create makes an object with a name, whole or not at all. The object is returned
// under its exclusive lock. The folder is locked until Init has returned.
func (v *Volume) Create(ctx context.Context, path string, n New) (*Object, error) {
	if v.session == nil {
		return nil, ErrReadOnly
	}
	parent, name, err := v.parentOf(ctx, path)
	if err != nil {
		return nil, err
	}
	return v.inFolder(ctx, parent, func(f *folder) (*Object, error) { return v.createIn(ctx, f, name, n) })
}

// inFolder makes an object under a folder's lock. When the object table is full it
// lets the folder go before it waits for the volume lock, whose holder may be
// waiting for the folder, and begins anew.
func (v *Volume) inFolder(ctx context.Context, parent Ref, create func(*folder) (*Object, error)) (*Object, error) {
	for {
		f, err := v.openFolder(ctx, parent)
		if err != nil {
			return nil, err
		}
		o, err := create(f)
		if cerr := f.Close(ctx); cerr != nil {
			err = errors.Join(err, cerr)
			if o != nil {
				err = errors.Join(err, v.bury(ctx, o), o.Close(ctx))
			}
			return nil, err
		}
		full, ok := errors.AsType[*tableFullError](err)
		if !ok {
			return o, err
		}
		if err := v.extendTable(ctx, full.groups); err != nil {
			return nil, err
		}
	}
}

func (v *Volume) createIn(ctx context.Context, f *folder, name string, n New) (*Object, error) {
	o, err := v.beginIn(ctx, f, name, n)
	if err != nil {
		return nil, err
	}
	if n.Init != nil {
		err = n.Init(ctx, o)
	}
	if err == nil {
		err = v.enliven(ctx, o)
	}
	if err != nil {
		return nil, errors.Join(err, v.undo(ctx, o, f, name), o.Close(ctx))
	}
	return o, nil
}

// beginIn makes the object and its entry, up to step 3.
func (v *Volume) beginIn(ctx context.Context, f *folder, name string, n New) (*Object, error) {
	entries, err := v.vacant(ctx, f, name)
	if err != nil {
		return nil, err
	}
	if err := v.sweep(ctx, f, entries, name); err != nil {
		return nil, err
	}
	o, err := v.newObject(ctx, n, f.ref, name)
	if err != nil {
		return nil, err
	}
	if err := f.add(context.WithoutCancel(ctx), Entry{Ref: o.ref, Kind: n.Kind, Name: name}); err != nil {
		return nil, errors.Join(err, v.undo(ctx, o, f, name), o.Close(ctx))
	}
	return o, nil
}

// vacant returns the folder's entries, or ErrExists when an object has the name.
func (v *Volume) vacant(ctx context.Context, f *folder, name string) ([]Entry, error) {
	entries, err := f.all(ctx)
	if err != nil {
		return nil, err
	}
	switch _, err := v.findIn(ctx, f.ref, entries, name); {
	case err == nil:
		return nil, fmt.Errorf("%q: %w", name, ErrExists)
	case !errors.Is(err, ErrNotFound):
		return nil, err
	}
	return entries, nil
}

// enliven turns an object that is being created LIVE, after all that it consists of
// is on media (R5). It may be repeated.
func (v *Volume) enliven(ctx context.Context, o *Object) error {
	ctx = context.WithoutCancel(ctx)
	if err := v.dev.Flush(ctx); err != nil {
		return fmt.Errorf("flush object %v: %w", o.ref, err)
	}
	return v.changeIdentity(ctx, o.ref.Slot, func(id *Identity) error {
		if id.Incarnation != o.ref.Incarnation || id.State == StateFree {
			return fmt.Errorf("object %v: %w: it was removed meanwhile", o.ref, ErrNotFound)
		}
		id.State = StateLive
		return nil
	})
}

// undo takes back an object that did not come to life, and its entry. What it
// cannot do is left to whoever finds the DYING object.
func (v *Volume) undo(ctx context.Context, o *Object, f *folder, name string) error {
	if err := v.bury(ctx, o); err != nil {
		return err
	}
	return f.remove(context.WithoutCancel(ctx), o.ref, name)
}

// manyProbes is how many slots a creation looks at before it rather extends the
// object table.
const manyProbes = 2 * ObjectsPerGroup

// newObject finds a free object slot, locks it, and begins the slot's next life. A
// *tableFullError asks for a longer object table.
func (v *Volume) newObject(ctx context.Context, n New, parent Ref, name string) (*Object, error) {
	groups, err := v.tableGroups(ctx)
	if err != nil {
		return nil, err
	}
	total := groups * ObjectsPerGroup
	probes := total
	if int64(groups) < v.geo.tableGroups() {
		probes = min(total, manyProbes)
	}
	v.mu.Lock()
	start := v.slots % total
	v.mu.Unlock()
	for i := range probes {
		slot := (start + i) % total
		l, incarnation, err := v.tryObject(ctx, slot)
		if err != nil {
			return nil, err
		}
		if l == nil {
			continue
		}
		v.mu.Lock()
		v.slots = slot + 1
		v.mu.Unlock()
		o := &Object{v: v, ref: Ref{slot, incarnation + 1}, kind: n.Kind, lock: l}
		if err := v.conceive(context.WithoutCancel(ctx), o, n, parent, name); err != nil {
			return nil, errors.Join(err, l.release(ctx))
		}
		return o, nil
	}
	return nil, &tableFullError{groups}
}

// tryObject locks a slot if it is free and nobody else is about to take it, and
// tells its last incarnation; nil when it is not to be had. A slot whose owner died
// on the way out, or on the way in, is freed first.
func (v *Volume) tryObject(ctx context.Context, slot uint32) (*Lock, uint16, error) {
	_, id, err := v.readIdentity(ctx, slot)
	if isDamage(err) {
		return nil, 0, nil // never to be trusted as free; check reports it
	}
	if err != nil || id.State == StateLive || id.Incarnation == MaxIncarnation && id.State == StateFree {
		return nil, 0, err
	}
	l, err := v.tryAcquire(ctx, slot)
	if isDamage(err) {
		return nil, 0, nil
	}
	if err != nil || l == nil {
		return nil, 0, err
	}
	_, id, err = v.readIdentity(ctx, slot)
	if err == nil && id.State == StateDying {
		if err = v.bury(ctx, &Object{v: v, ref: Ref{slot, id.Incarnation}, kind: id.Kind, lock: l}); err == nil {
			id.State = StateFree
		} else if isDamage(err) || errors.Is(err, ErrHeld) {
			err = nil // another slot will do
		}
	}
	if err == nil && id.State == StateFree && id.Incarnation < MaxIncarnation {
		return l, id.Incarnation, nil
	}
	return nil, 0, errors.Join(err, l.release(ctx))
}

// conceive takes the first two steps of a creation in a slot that o has locked.
func (v *Volume) conceive(ctx context.Context, o *Object, n New, parent Ref, name string) error {
	if err := o.PutHeader(ctx, Header{SizeBytes: n.SizeBytes, Origin: n.Origin, OriginUUID: n.OriginUUID, Payload: n.Payload}); err != nil {
		return err
	}
	begin := func() error {
		return v.changeIdentity(ctx, o.ref.Slot, func(id *Identity) error {
			free := id.State == StateFree && id.Incarnation == o.ref.Incarnation-1
			mine := id.State == StateDying && id.Incarnation == o.ref.Incarnation // by an attempt that was in doubt
			if !free && !mine {
				return fmt.Errorf("object slot %d: %w: it was taken meanwhile", o.ref.Slot, ErrHeld)
			}
			*id = Identity{State: StateDying, Kind: n.Kind, Incarnation: o.ref.Incarnation, Parent: parent, Name: name}
			return nil
		})
	}
	if n.Origin == (Ref{}) {
		return begin()
	}
	return v.reference(ctx, n.Origin, o.ref, +1, begin)
}

// Mkdir creates an empty folder.
func (v *Volume) Mkdir(ctx context.Context, path string) error {
	empty := FolderContent{form: formInline}
	o, err := v.Create(ctx, path, New{Kind: KindFolder, Payload: empty.Encode()})
	if err != nil {
		return err
	}
	return o.Close(ctx)
}
