package vmfs

import (
	"context"
	"errors"
	"fmt"
	"time"

	"basalt/lease"
)

// References (R17). A disk counts its published snapshots, a published snapshot its
// clones. A change of a count is announced on the origin's identity as pending,
// then the child begins or ends, then the count is settled. When the actor dies in
// between, whoever comes next looks at the child and settles for it.
//
// Of one mount, one goroutine at a time changes an origin's count: a pending change
// that names this mount is then always one that failed.

// reference changes the count of origin by delta around do, which makes child
// depend on origin, or stop. The origin must be LIVE to gain a child.
func (v *Volume) reference(ctx context.Context, origin, child Ref, delta int8, do func() error) error {
	if err := v.enterOrigin(ctx, origin); err != nil {
		return err
	}
	defer v.origins.leave(origin.Slot)
	p := Pending{Delta: delta, Child: child, Actor: v.self()}
	announced, err := v.announce(ctx, origin, p)
	if err != nil {
		return err
	}
	if err := do(); err != nil {
		return errors.Join(err, v.resolve(ctx, origin))
	}
	if !announced {
		return nil
	}
	return v.settle(ctx, origin, p, delta > 0)
}

func (v *Volume) enterOrigin(ctx context.Context, origin Ref) error {
	ok, err := v.origins.enter(ctx, v.clk, origin.Slot, operation)
	if err == nil && !ok {
		err = fmt.Errorf("object %v: %w: who depends on it is being changed", origin, ErrHeld)
	}
	return err
}

// announce records the change as pending. It reports false when there is nothing
// to change: the reference was dropped before a crash.
func (v *Volume) announce(ctx context.Context, origin Ref, p Pending) (bool, error) {
	deadline := v.clk.Now().Add(time.Duration(operation))
	for {
		if err := v.resolve(ctx, origin); err != nil {
			return false, err
		}
		err := v.changeIdentity(ctx, origin.Slot, func(id *Identity) error {
			switch {
			case id.Incarnation == origin.Incarnation && id.Pending == p:
				return errSettled // by an attempt that was in doubt
			case id.Incarnation != origin.Incarnation || id.State == StateFree || (p.Delta > 0 && id.State != StateLive):
				return fmt.Errorf("object %v: %w: it was removed meanwhile", origin, ErrNotFound)
			case id.Pending.Delta != 0:
				return errBusy
			case p.Delta < 0 && id.Count == 0:
				return errNoReference
			}
			if p.Delta < 0 {
				id.Count--
			}
			id.Pending = p
			return nil
		})
		switch {
		case err == nil, errors.Is(err, errSettled):
			return true, nil
		case errors.Is(err, errNoReference), p.Delta < 0 && errors.Is(err, ErrNotFound):
			return false, nil
		case !errors.Is(err, errBusy):
			return false, err
		case v.clk.Now() > deadline:
			return false, fmt.Errorf("object %v: %w: another host is changing who depends on it", origin, ErrHeld)
		}
		if err := v.sleep(ctx, 20*time.Millisecond); err != nil {
			return false, err
		}
	}
}

var (
	errBusy        = errors.New("vmfs: a reference is being changed")
	errNoReference = errors.New("vmfs: no reference is counted")
	errSettled     = errors.New("vmfs: the reference is as it should be")
)

// settleReference folds a change that was left pending into the count, when that is
// this mount's own or its actor is dead. Another live actor's is left to it.
func (v *Volume) settleReference(ctx context.Context, origin Ref) error {
	if err := v.enterOrigin(ctx, origin); err != nil {
		return err
	}
	defer v.origins.leave(origin.Slot)
	return v.resolve(ctx, origin)
}

// insist settles a pending change even if its actor is only silent: it is waited
// for, and broken. A living actor's change is left to it.
func (v *Volume) insist(ctx context.Context, origin Ref) error {
	_, id, err := v.readIdentity(ctx, origin.Slot)
	if err != nil {
		return err
	}
	if a := id.Pending.Actor; id.Pending.Delta != 0 && a != v.self() {
		err := v.session.Break(ctx, int(a.Slot), a.Generation)
		if err != nil && !errors.Is(err, lease.ErrAlive) && !errors.Is(err, lease.ErrUnfenced) {
			return err
		}
	}
	return v.settleReference(ctx, origin)
}

// resolve is settleReference for those who have the origin's semaphore.
func (v *Volume) resolve(ctx context.Context, origin Ref) error {
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
	return v.settle(ctx, origin, p, counts)
}

// settle ends the pending change p, counting its child or not.
func (v *Volume) settle(ctx context.Context, origin Ref, p Pending, counts bool) error {
	err := v.changeIdentity(ctx, origin.Slot, func(id *Identity) error {
		if id.Incarnation != origin.Incarnation || id.Pending != p {
			return errSettled // by another
		}
		id.Pending = Pending{}
		if counts {
			id.Count++
		}
		return nil
	})
	if errors.Is(err, errSettled) {
		return nil
	}
	return err
}

// dependsOn tells whether a child counts: its incarnation is current, it is not
// FREE, and its header names this origin. The child's identity is superseded, so
// that a late command of the dead actor cannot change the answer.
func (v *Volume) dependsOn(ctx context.Context, child, origin Ref) (bool, error) {
	p := v.identityPlace(child.Slot)
	img, err := v.supersede(ctx, p, func([]byte) (bool, error) { return true, nil })
	if err != nil {
		return false, err
	}
	id, err := DecodeIdentity(p, img)
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
	if disk.LockGeneration() == 0 {
		return Ref{}, ErrReadOnly
	}
	// The name that fill makes durable is taken before: no other object can ever
	// have it.
	n := New{Kind: KindSnapshot, SizeBytes: sizeBytes, Origin: disk.ref, OriginUUID: uuid}
	o, err := v.newObject(ctx, n, disk.ref, "")
	for full, ok := errors.AsType[*tableFullError](err); ok; full, ok = errors.AsType[*tableFullError](err) {
		if err := v.extendTable(ctx, full.groups); err != nil {
			return Ref{}, err
		}
		o, err = v.newObject(ctx, n, disk.ref, "")
	}
	if err != nil {
		return Ref{}, err
	}
	payload, err := fill(o.ref)
	if err == nil {
		err = o.edit(ctx, func(h *Header) { h.Payload = payload })
	}
	if err == nil {
		err = v.enliven(ctx, o)
	}
	if err != nil {
		err = errors.Join(err, v.bury(ctx, o))
	}
	return o.ref, errors.Join(err, o.Close(ctx))
}

// Unpublish ends a published snapshot that no clone depends on. It is no error when
// it has ended already. The caller holds the disk's exclusive lock.
func (v *Volume) Unpublish(ctx context.Context, ref Ref) error {
	if v.session == nil {
		return ErrReadOnly
	}
	gone := func() (*Identity, bool, error) {
		_, id, err := v.readIdentity(ctx, ref.Slot)
		return id, err == nil && (id.State == StateFree || id.Incarnation != ref.Incarnation), err
	}
	if _, ended, err := gone(); err != nil || ended {
		return err
	}
	l, err := v.acquire(ctx, ref.Slot, LockExclusive, operation)
	if err != nil {
		return err
	}
	id, ended, err := gone()
	switch {
	case err != nil || ended:
	case id.Kind != KindSnapshot:
		err = fmt.Errorf("object %v: %w: it is a %v", ref, ErrKind, id.Kind)
	default:
		err = v.endSnapshot(ctx, &Object{v: v, ref: ref, kind: id.Kind, lock: l})
	}
	return errors.Join(err, l.release(ctx))
}

// IsLive reports whether ref is the current life of its slot, and LIVE.
func (v *Volume) IsLive(ctx context.Context, ref Ref) (bool, error) {
	_, id, err := v.readIdentity(ctx, ref.Slot)
	if err != nil {
		return false, err
	}
	return id.State == StateLive && id.Incarnation == ref.Incarnation, nil
}

// endSnapshot buries a published snapshot, unless clones depend on it. Those whose
// creation or removal a crash cut off count until they are buried.
func (v *Volume) endSnapshot(ctx context.Context, o *Object) error {
	if err := v.insist(ctx, o.ref); err != nil {
		return err
	}
	_, id, err := v.readIdentity(ctx, o.ref.Slot)
	if err == nil && id.Count > 0 {
		err = v.reapDying(ctx, func(id *Identity) bool { return id.Kind == KindDisk })
	}
	if err != nil {
		return err
	}
	return v.bury(ctx, o)
}
