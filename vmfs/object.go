package vmfs

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"basalt/block"
)

// Object is one object of the volume, opened under its lock or, without one, as a
// view whose content may be changing.
type Object struct {
	v    *Volume
	ref  Ref
	kind Kind
	lock *Lock // nil for a view

	mu     sync.Mutex // guards what follows
	header *Header    // newest that this handle has read or written; nil before the first
	copyB  bool       // header lies in copy B
	failed error      // of the header write that failed; the next opening finds out what is on media
}

// Ref names the object and its life.
func (o *Object) Ref() Ref { return o.ref }

// Kind is what the object is.
func (o *Object) Kind() Kind { return o.kind }

// LockGeneration is the generation of the exclusive lock that the object is open
// under; 0 for a view.
func (o *Object) LockGeneration() uint64 {
	if o.lock == nil || o.lock.mode != LockExclusive {
		return 0
	}
	return o.lock.record.Generation
}

// PreviousHolder is the lock record as this mount's acquisition found it: whose
// generation wrote last.
func (o *Object) PreviousHolder() LockRecord { return o.lock.before }

// Close gives the lock up; every operation on the object has ended.
func (o *Object) Close(ctx context.Context) error {
	if o.lock == nil {
		return nil
	}
	return o.lock.release(ctx)
}

func (v *Volume) readIdentity(ctx context.Context, slot uint32) ([]byte, *Identity, error) {
	p := v.identityPlace(slot)
	img, _, err := p.Read(ctx, v.dev)
	if err != nil {
		return nil, nil, err
	}
	id, err := DecodeIdentity(p, img)
	return img, id, err
}

// changeIdentity edits an identity unit by compare-and-write until it takes effect.
// edit returns an error to give up.
func (v *Volume) changeIdentity(ctx context.Context, slot uint32, edit func(*Identity) error) error {
	p := v.identityPlace(slot)
	_, err := v.change(ctx, p, func(img []byte) ([]byte, error) {
		id, err := DecodeIdentity(p, img)
		if err != nil {
			return nil, err
		}
		if err := edit(id); err != nil {
			return nil, err
		}
		return id.Encode(img), nil
	})
	return err
}

// open locks ref and checks, now that nobody can change it, that it is still the
// object that the caller looked up (R3).
func (v *Volume) open(ctx context.Context, ref Ref, mode LockMode, wait Patience) (*Object, error) {
	l, err := v.acquire(ctx, ref.Slot, mode, wait)
	if err != nil {
		return nil, err
	}
	_, id, err := v.readIdentity(ctx, ref.Slot)
	if err == nil && (id.State != StateLive || id.Incarnation != ref.Incarnation) {
		err = fmt.Errorf("object %v: %w: it was removed meanwhile", ref, ErrNotFound)
	}
	if err != nil {
		return nil, errors.Join(err, l.release(ctx))
	}
	return &Object{v: v, ref: ref, kind: id.Kind, lock: l}, nil
}

// Open opens ref under its lock.
func (v *Volume) Open(ctx context.Context, ref Ref, mode LockMode, wait Patience) (*Object, error) {
	o, err := v.open(ctx, ref, mode, wait)
	if err != nil {
		return nil, err
	}
	if _, err := o.Header(ctx); err != nil {
		return nil, errors.Join(err, o.Close(ctx))
	}
	if err := o.settleIntents(ctx); err != nil {
		return nil, errors.Join(err, o.Close(ctx))
	}
	return o, nil
}

// OpenView opens ref without a lock, for reading what may be changing.
func (v *Volume) OpenView(ctx context.Context, ref Ref) (*Object, error) {
	_, id, err := v.readIdentity(ctx, ref.Slot)
	if err != nil {
		return nil, err
	}
	if id.State != StateLive || id.Incarnation != ref.Incarnation {
		return nil, fmt.Errorf("object %v: %w", ref, ErrNotFound)
	}
	return &Object{v: v, ref: ref, kind: id.Kind}, nil
}

// viewReads bounds how often a view re-reads a header that is being written.
const viewReads = 8

// Header returns the newest header. Under a lock it is read once; a view reads it
// anew each time.
func (o *Object) Header(ctx context.Context) (*Header, error) {
	o.mu.Lock()
	h := o.header
	o.mu.Unlock()
	if h != nil && o.lock != nil {
		return h, nil
	}
	var err error
	for range viewReads {
		var copyB bool
		if h, _, copyB, err = o.readHeaders(ctx); err == nil {
			o.mu.Lock()
			o.header, o.copyB = h, copyB
			o.mu.Unlock()
			return h, nil
		}
		if o.lock != nil {
			break
		}
	}
	return nil, err
}

// readHeaders reads both copies and gives the newer valid one, the other if it is
// valid too, and which copy the newer one is.
func (o *Object) readHeaders(ctx context.Context) (newest, other *Header, copyB bool, err error) {
	base := objectOff(o.ref.Slot)
	b := block.AlignedBuffer(2 * HeaderBytes)
	if err := o.v.dev.ReadAt(ctx, b, base+headerAOff); err != nil {
		return nil, nil, false, fmt.Errorf("read header of object %v: %w", o.ref, err)
	}
	copyA, errA := o.ownHeader(b[:HeaderBytes], base+headerAOff)
	copyOfB, errB := o.ownHeader(b[HeaderBytes:], base+headerBOff)
	switch {
	case errA != nil && errB != nil:
		return nil, nil, false, fmt.Errorf("object %v has no valid header: %w", o.ref, errA)
	case errA != nil:
		return copyOfB, nil, true, nil
	case errB != nil:
		return copyA, nil, false, nil
	case copyOfB.Sequence > copyA.Sequence:
		return copyOfB, copyA, true, nil
	}
	return copyA, copyOfB, false, nil
}

func (o *Object) ownHeader(b []byte, offBytes int64) (*Header, error) {
	h, err := DecodeHeader(b, o.v.sb.Volume, offBytes)
	if err == nil && h.Self != o.ref {
		err = &block.CorruptError{Object: "object header", OffBytes: offBytes, Reason: fmt.Sprintf("is of object %v, not %v", h.Self, o.ref)}
	}
	return h, err
}

// PutHeader makes h the object's newest header, durably, in the place of the older
// copy. It sets Sequence, LockGeneration, Self, Kind and Modified. What the header
// refers to has been flushed before. One call at a time. A cancelled ctx does not
// end the write; after a failed one the handle writes no more headers, as nobody
// can tell which copy is the older one.
func (o *Object) PutHeader(ctx context.Context, h Header) error {
	gen := o.LockGeneration()
	if gen == 0 {
		return ErrReadOnly
	}
	o.mu.Lock()
	last, toB, failed := o.header, !o.copyB, o.failed
	o.mu.Unlock()
	if failed != nil {
		return failed
	}
	h.Sequence, toB = 1, toB && last != nil
	if last != nil {
		// The media decide which copy is the older: had the last write been acknowledged
		// and lost, the place of the older one in memory would be that of the only one.
		newest, _, newestInB, err := o.readHeaders(context.WithoutCancel(ctx))
		switch {
		case err == nil:
			h.Sequence, toB = max(last.Sequence, newest.Sequence)+1, !newestInB
		case isDamage(err):
			h.Sequence = last.Sequence + 1
		default:
			return err
		}
	}
	h.LockGeneration, h.Self, h.Kind, h.Modified = gen, o.ref, o.kind, o.v.clk.Wall()
	if h.Created.IsZero() || h.Sequence == 1 {
		h.Created = h.Modified
	}
	if len(h.Payload) > MaxPayload || len(h.Intents) > maxIntents {
		panic(fmt.Sprintf("vmfs: header of %d payload bytes and %d intents", len(h.Payload), len(h.Intents)))
	}
	off := objectOff(o.ref.Slot) + headerAOff
	if toB {
		off = objectOff(o.ref.Slot) + headerBOff
	}
	b := block.AlignedBuffer(HeaderBytes)
	h.Encode(b, o.v.sb.Volume, off)
	err := o.v.dev.WriteFUA(context.WithoutCancel(ctx), b, off)
	o.mu.Lock()
	defer o.mu.Unlock()
	if err != nil {
		o.failed = fmt.Errorf("write header of object %v: %w", o.ref, err)
		return o.failed
	}
	o.header, o.copyB = &h, toB
	return nil
}

// edit applies f to a copy of the newest header and puts it.
func (o *Object) edit(ctx context.Context, f func(*Header)) error {
	h, err := o.Header(ctx)
	if err != nil {
		return err
	}
	next := *h
	f(&next)
	return o.PutHeader(ctx, next)
}

// editTwice leaves the same content in both copies, for objects that have no other
// record of a change: a copy that rots, or whose write was acknowledged and lost,
// then takes no name and no content with it. A disk has its log for that.
func (o *Object) editTwice(ctx context.Context, f func(*Header)) error {
	if err := o.edit(ctx, f); err != nil {
		return err
	}
	return o.edit(ctx, func(*Header) {})
}

// readLock reads a lock record without taking it.
func (v *Volume) readLock(ctx context.Context, slot uint32) (*LockRecord, error) {
	p := v.lockPlace(slot)
	img, _, err := p.Read(ctx, v.dev)
	if err != nil {
		return nil, err
	}
	return DecodeLock(p, img)
}
