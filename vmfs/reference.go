package vmfs

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// References (R17). A disk counts its published snapshots, a published snapshot its
// clones. A change of a count is announced on the origin's identity as pending,
// then the child comes to life or ends, then the count is settled. When the actor
// dies in between, whoever comes next looks at the child and settles for it.

// announceReference records that child is about to depend on origin (+1) or to
// stop (-1). The origin must be LIVE to gain a child.
func (v *Volume) announceReference(ctx context.Context, origin, child Ref, delta int8) error {
	deadline := v.clk.Now().Add(time.Duration(operation))
	for {
		if err := v.settleReference(ctx, origin); err != nil {
			return err
		}
		busy := false
		err := v.changeIdentity(ctx, origin.Slot, func(id *Identity) error {
			switch {
			case id.Incarnation != origin.Incarnation || id.State == StateFree || (delta > 0 && id.State != StateLive):
				return fmt.Errorf("object %v: %w: it was removed meanwhile", origin, ErrNotFound)
			case id.Pending.Delta != 0:
				busy = true
				return errBusy
			case delta < 0 && id.Count == 0:
				return errNoReference
			}
			if delta < 0 {
				id.Count--
			}
			id.Pending = Pending{Delta: delta, Child: child, Actor: v.self()}
			return nil
		})
		switch {
		case errors.Is(err, errNoReference), delta < 0 && errors.Is(err, ErrNotFound):
			return nil // it was dropped before a crash
		case !busy:
			return err
		case v.clk.Now() > deadline:
			return fmt.Errorf("object %v: %w: another host is changing who depends on it", origin, ErrHeld)
		}
		if err := v.sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

var (
	errBusy        = errors.New("vmfs: a reference is being changed")
	errNoReference = errors.New("vmfs: no reference is counted")
	errNothing     = errors.New("vmfs: nothing to change")
)

// settleReference folds a pending change into the count, when it is this mount's
// own or its actor is dead. Another live actor's is left to it.
func (v *Volume) settleReference(ctx context.Context, origin Ref) error {
	_, id, err := v.readIdentity(ctx, origin.Slot)
	if err != nil || id.Pending.Delta == 0 || id.Incarnation != origin.Incarnation {
		return err
	}
	p := id.Pending
	if p.Actor != v.self() {
		dead, err := v.session.Dead(ctx, int(p.Actor.Slot), p.Actor.Generation)
		if err != nil || !dead {
			return err
		}
	}
	counts, err := v.dependsOn(ctx, p.Child, origin)
	if err != nil {
		return err
	}
	err = v.changeIdentity(ctx, origin.Slot, func(id *Identity) error {
		if id.Incarnation != origin.Incarnation || id.Pending != p {
			return errNothing // settled by another
		}
		id.Pending = Pending{}
		if counts {
			id.Count++
		}
		return nil
	})
	if errors.Is(err, errNothing) {
		return nil
	}
	return err
}

// dependsOn tells whether a child counts: its incarnation is current, it is not
// FREE, and its header names this origin.
func (v *Volume) dependsOn(ctx context.Context, child, origin Ref) (bool, error) {
	_, id, err := v.readIdentity(ctx, child.Slot)
	if err != nil || id.State == StateFree || id.Incarnation != child.Incarnation {
		return false, err
	}
	o := &Object{v: v, ref: child, kind: id.Kind}
	h, err := o.Header(ctx)
	if err != nil {
		return false, err
	}
	return h.Origin == origin, nil
}

// Publish makes a snapshot of a disk, which is open under its exclusive lock, an
// object of its own, that other objects and hosts can refer to. fill gets the new
// object's name and returns its header payload, after it has made durable in the
// disk's log that the snapshot is published under that name, and its root on media.
func (v *Volume) Publish(ctx context.Context, disk *Object, uuid [16]byte, sizeBytes int64, fill func(Ref) ([]byte, error)) (Ref, error) {
	o, err := v.newObject(ctx, New{Kind: KindSnapshot})
	if err != nil {
		return Ref{}, err
	}
	payload, err := fill(o.ref)
	if err == nil {
		err = v.bringToLife(ctx, o, New{
			Kind: KindSnapshot, SizeBytes: sizeBytes, Origin: disk.ref, OriginUUID: uuid, Payload: payload,
		}, disk.ref, "")
	}
	return o.ref, errors.Join(err, o.Close(ctx))
}

// Unpublish ends a published snapshot that no clone depends on. It is no error when
// it has ended already. The caller holds the disk's exclusive lock.
func (v *Volume) Unpublish(ctx context.Context, ref Ref) error {
	if ok, err := v.IsLive(ctx, ref); err != nil || !ok {
		return err
	}
	o, err := v.open(ctx, ref, LockExclusive, operation)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	err = v.settleReference(ctx, ref)
	if err == nil {
		err = v.bury(ctx, o)
	}
	return errors.Join(err, o.Close(ctx))
}

// IsLive reports whether ref is the current life of its slot, and LIVE.
func (v *Volume) IsLive(ctx context.Context, ref Ref) (bool, error) {
	_, id, err := v.readIdentity(ctx, ref.Slot)
	if err != nil {
		return false, err
	}
	return id.State == StateLive && id.Incarnation == ref.Incarnation, nil
}
