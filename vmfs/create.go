package vmfs

import (
	"context"
	"errors"
	"fmt"

	"basalt/block"
)

// New describes an object to be created.
type New struct {
	Kind       Kind
	SizeBytes  int64
	Origin     Ref      // the published snapshot that a clone starts from
	OriginUUID [16]byte //
	Payload    []byte   // the first header's content
	// Init, if set, goes on from the first header, before anybody can see the object.
	Init func(ctx context.Context, o *Object) error
}

// Create makes an object with a name: the object first, its entry second (R4). A
// crash in between leaves an object that no folder shows, never a name without an
// object. The object is returned under its exclusive lock.
func (v *Volume) Create(ctx context.Context, path string, n New) (*Object, error) {
	if v.session == nil {
		return nil, ErrReadOnly
	}
	parent, name, err := v.parentOf(ctx, path)
	if err != nil {
		return nil, err
	}
	f, err := v.openFolder(ctx, parent)
	if err != nil {
		return nil, err
	}
	o, err := v.createIn(ctx, f, name, n)
	if cerr := f.Close(ctx); cerr != nil && o != nil {
		return nil, errors.Join(cerr, o.Close(ctx))
	}
	return o, err
}

func (v *Volume) createIn(ctx context.Context, f *folder, name string, n New) (*Object, error) {
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
	if err := v.sweep(ctx, f, entries); err != nil {
		return nil, err
	}
	o, err := v.newObject(ctx, n)
	if err != nil {
		return nil, err
	}
	err = v.bringToLife(ctx, o, n, f.ref, name)
	if err == nil {
		err = f.add(ctx, Entry{Ref: o.ref, Kind: n.Kind, Name: name})
		if err != nil {
			// Nobody can find it: take it back rather than leave an orphan.
			err = errors.Join(err, v.bury(ctx, o))
		}
	}
	if err != nil {
		return nil, errors.Join(err, o.Close(ctx))
	}
	return o, nil
}

// bringToLife writes the object's first header and turns its identity LIVE. A
// clone's reference on its origin is counted before (R17).
func (v *Volume) bringToLife(ctx context.Context, o *Object, n New, parent Ref, name string) error {
	if n.Origin != (Ref{}) {
		if err := v.announceReference(ctx, n.Origin, o.ref, +1); err != nil {
			return err
		}
	}
	err := o.PutHeader(ctx, Header{SizeBytes: n.SizeBytes, Origin: n.Origin, OriginUUID: n.OriginUUID, Payload: n.Payload})
	if err == nil && n.Init != nil {
		err = n.Init(ctx, o)
	}
	if err == nil {
		err = v.dev.Flush(ctx)
	}
	if err == nil {
		err = v.changeIdentity(ctx, o.ref.Slot, func(id *Identity) error {
			*id = Identity{State: StateLive, Kind: n.Kind, Incarnation: o.ref.Incarnation, Parent: parent, Name: name}
			return nil
		})
	}
	if n.Origin != (Ref{}) {
		err = errors.Join(err, v.settleReference(ctx, n.Origin))
	}
	return err
}

// newObject finds a free object slot and locks it, for its next incarnation.
func (v *Volume) newObject(ctx context.Context, n New) (*Object, error) {
	for {
		groups, err := v.tableGroups(ctx)
		if err != nil {
			return nil, err
		}
		total := groups * ObjectsPerGroup
		v.mu.Lock()
		start := v.slots % total
		v.mu.Unlock()
		for i := range total {
			o, err := v.tryObject(ctx, (start+i)%total, n.Kind)
			if err != nil {
				return nil, err
			}
			if o != nil {
				v.mu.Lock()
				v.slots = o.ref.Slot + 1
				v.mu.Unlock()
				return o, nil
			}
		}
		if err := v.extendTable(ctx, groups); err != nil {
			return nil, err
		}
	}
}

// tryObject locks a slot if it is free and nobody else is about to take it; nil
// when it is not to be had.
func (v *Volume) tryObject(ctx context.Context, slot uint32, kind Kind) (*Object, error) {
	usable := func(id *Identity) bool { return id.State == StateFree && id.Incarnation < MaxIncarnation }
	_, id, err := v.readIdentity(ctx, slot)
	var damaged *block.CorruptError
	if errors.As(err, &damaged) {
		return nil, nil // never to be trusted as free; check reports it
	}
	if err != nil || !usable(id) {
		return nil, err
	}
	rec, err := v.readLock(ctx, slot)
	if err != nil {
		return nil, err
	}
	if rec.Mode != LockFree {
		if dead, err := v.session.Dead(ctx, int(rec.Owner.Slot), rec.Owner.Generation); err != nil || !dead {
			return nil, err
		}
	}
	l, err := v.acquire(ctx, slot, LockExclusive, operation)
	if err != nil {
		return nil, err
	}
	_, id, err = v.readIdentity(ctx, slot)
	if err != nil || !usable(id) {
		return nil, errors.Join(err, l.release(ctx))
	}
	return &Object{v: v, ref: Ref{Slot: slot, Incarnation: id.Incarnation + 1}, kind: kind, lock: l}, nil
}

// tableGroups reads how many groups have their part of the object table.
func (v *Volume) tableGroups(ctx context.Context) (uint32, error) {
	p := v.volumePlace()
	img, _, err := p.Read(ctx, v.dev)
	if err != nil {
		return 0, err
	}
	r, err := decodeVolumeRecord(p, img, v.geo)
	return r.TableGroups, err
}

// extendTable initialises the next group's part of the object table, under the
// volume lock: zero, write the units, flush, then raise the count (R6).
func (v *Volume) extendTable(ctx context.Context, have uint32) error {
	if int64(have) >= v.geo.tableGroups() {
		return fmt.Errorf("%w: the volume has %d", ErrNoObjects, have*ObjectsPerGroup)
	}
	l, err := v.acquire(ctx, volumeSlot, LockExclusive, operation)
	if err != nil {
		return err
	}
	groups, err := v.tableGroups(ctx)
	if err == nil && groups == have {
		err = initTablePart(ctx, v.dev, v.sb.Volume, v.geo, have, v.nonce)
		if err == nil {
			p := v.volumePlace()
			_, err = v.change(ctx, p, func(img []byte) ([]byte, error) {
				r, err := decodeVolumeRecord(p, img, v.geo)
				if err != nil {
					return nil, err
				}
				r.TableGroups = have + 1
				return r.encode(img), nil
			})
		}
	}
	return errors.Join(err, l.release(ctx))
}

// Mkdir creates an empty folder.
func (v *Volume) Mkdir(ctx context.Context, path string) error {
	empty := folderContent{form: formInline}
	o, err := v.Create(ctx, path, New{Kind: KindFolder, Payload: empty.encode()})
	if err != nil {
		return err
	}
	return o.Close(ctx)
}
