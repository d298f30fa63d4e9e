package vmfs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"basalt/block/unit"
	"basalt/lease"
)

// Lock is an object's lock as this mount holds it.
type Lock struct {
	v      *Volume
	slot   uint32
	mode   LockMode
	img    []byte // the lock unit as this mount left it
	record LockRecord
	before LockRecord // as it was before the acquisition
}

// Patience says how long to wait for a holder that is alive.
type Patience time.Duration

const (
	// NoWait reports a live holder at once. A dead one is still broken first, which
	// takes its lease's length where nothing proves its death.
	NoWait = Patience(0)
	// operation is the patience with locks that are held for one operation.
	operation = Patience(30 * time.Second)
	// pollFirst is how long a short lock is polled before its holder is suspected.
	pollFirst = 200 * time.Millisecond
)

// enter takes the in-process semaphore of an object slot.
func (v *Volume) enter(ctx context.Context, slot uint32) error {
	v.mu.Lock()
	c := v.local[slot]
	if c == nil {
		c = make(chan struct{}, 1)
		v.local[slot] = c
	}
	v.mu.Unlock()
	select {
	case c <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (v *Volume) leave(slot uint32) {
	v.mu.Lock()
	defer v.mu.Unlock()
	<-v.local[slot]
}

// acquire locks an object slot. A dead holder's lock is free: it is taken without
// ceremony. A record that names this mount although nobody in this process holds
// it is adopted. The lock generation rises by one.
func (v *Volume) acquire(ctx context.Context, slot uint32, mode LockMode, wait Patience) (*Lock, error) {
	if v.session == nil {
		return nil, ErrReadOnly
	}
	if err := v.enter(ctx, slot); err != nil {
		return nil, err
	}
	l, err := v.acquireEntered(ctx, slot, mode, wait)
	if err != nil {
		v.leave(slot)
		return nil, err
	}
	return l, nil
}

func (v *Volume) acquireEntered(ctx context.Context, slot uint32, mode LockMode, wait Patience) (*Lock, error) {
	p := v.lockPlace(slot)
	start := v.clk.Now()
	for pause := time.Millisecond; ; {
		img, _, err := p.Read(ctx, v.dev)
		if err != nil {
			return nil, err
		}
		was, err := DecodeLock(p, img)
		if err != nil {
			return nil, err
		}
		next, blocker, err := v.claimOf(ctx, *was, mode)
		if err != nil {
			return nil, err
		}
		if blocker == nil {
			r, err := p.Swap(ctx, v.dev, img, next.encode(img), v.nonce)
			if err == nil {
				return &Lock{v: v, slot: slot, mode: mode, img: r.Image, record: next, before: *was}, nil
			}
			if errors.Is(err, unit.ErrConflict) || errors.Is(err, unit.ErrNotExecuted) {
				continue
			}
			return nil, err
		}
		waited := v.clk.Now().Sub(start)
		if wait != NoWait && waited < pollFirst {
			if err := v.sleep(ctx, pause); err != nil {
				return nil, err
			}
			pause = min(2*pause, 20*time.Millisecond)
			continue
		}
		if err := v.overcome(ctx, slot, *blocker, was.Since, waited >= time.Duration(wait)); err != nil {
			return nil, err
		}
	}
}

// claimOf computes the record after taking a lock with record was, or who alive is
// in the way.
func (v *Volume) claimOf(ctx context.Context, was LockRecord, mode LockMode) (LockRecord, *Holder, error) {
	me := v.self()
	var live []Holder
	owner := was.Mode == LockExclusive || was.Mode == LockMultiWriter
	holders := was.Shared
	if owner {
		holders = append([]Holder{was.Owner}, holders...)
	}
	for _, h := range holders {
		if h == me {
			continue
		}
		dead, err := v.session.Dead(ctx, int(h.Slot), h.Generation)
		if err != nil {
			return LockRecord{}, nil, err
		}
		if !dead {
			live = append(live, h)
		}
	}
	next := was
	next.Mode, next.Generation, next.Since = mode, was.Generation+1, v.clk.Wall()
	next.Target, next.Want, next.Waiter = Holder{}, 0, Holder{}
	switch mode {
	case LockExclusive:
		next.Owner, next.Shared = me, nil
		if len(live) > 0 {
			return LockRecord{}, &live[0], nil
		}
	case LockShared:
		next.Owner = Holder{}
		if len(live) > 0 && owner {
			return LockRecord{}, &live[0], nil
		}
		next.Shared = append(slices.Clone(live), me)
		if len(next.Shared) > MaxSharedHolders {
			return LockRecord{}, nil, fmt.Errorf("%w: %d hosts share the lock already", ErrHeld, MaxSharedHolders)
		}
	default:
		panic("vmfs: acquire in mode " + mode.String())
	}
	return next, nil, nil
}

// overcome returns nil when the holder turned out dead or has had time to move on,
// else a HeldError.
func (v *Volume) overcome(ctx context.Context, slot uint32, h Holder, since time.Time, last bool) error {
	err := v.session.Break(ctx, int(h.Slot), h.Generation)
	if err == nil || (errors.Is(err, lease.ErrAlive) && !last) {
		return nil
	}
	held := &HeldError{Path: v.describe(ctx, slot), Slot: int(h.Slot), Generation: h.Generation}
	if age := v.clk.Wall().Sub(since); age > 0 {
		held.Age = age
	}
	if who, ok := errors.AsType[*lease.HolderError](err); ok {
		held.HostName = who.HostName
	}
	if !errors.Is(err, lease.ErrAlive) {
		held.Cause = err
	}
	return held
}

// describe names an object for a message, by its identity when that can be read.
func (v *Volume) describe(ctx context.Context, slot uint32) string {
	if _, id, err := v.readIdentity(ctx, slot); err == nil && id.Name != "" {
		return fmt.Sprintf("%s %q", id.Kind, id.Name)
	}
	return fmt.Sprintf("object %d", slot)
}

// release gives the lock up. Every command under it has ended (R20). It runs to
// its end even when ctx is cancelled, unless the lease is lost.
func (l *Lock) release(ctx context.Context) error {
	v := l.v
	defer v.leave(l.slot)
	ctx = context.WithoutCancel(ctx)
	p := v.lockPlace(l.slot)
	me := v.self()
	_, err := v.change(ctx, p, func(img []byte) ([]byte, error) {
		r, err := DecodeLock(p, img)
		if err != nil {
			return nil, err
		}
		switch {
		case r.Mode == LockShared && slices.Contains(r.Shared, me):
			r.Shared = slices.DeleteFunc(slices.Clone(r.Shared), func(h Holder) bool { return h == me })
			if len(r.Shared) == 0 {
				r.Mode = LockFree
			}
		case r.Mode == LockExclusive && r.Owner == me:
			r.Mode, r.Owner = LockFree, Holder{}
		default:
			return nil, nil // no longer ours: a fence took it
		}
		return r.encode(img), nil
	})
	return err
}
