package vmfs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"basalt/block"
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
	// brief is the patience of those who hold a folder: others may wait for that one
	// while they hold what is wanted here.
	brief = Patience(suspectAfter)
	// suspectAfter is how long a lock is polled before its holder is suspected, and
	// again after each sign of life.
	suspectAfter = 200 * time.Millisecond
)

// acquire locks an object slot. A dead holder's lock is free: it is taken without
// ceremony. A record that names this mount although nobody in this process holds
// it is adopted. The lock generation rises by one. ErrHeld: its holder is alive, or
// cannot be proven dead.
func (v *Volume) acquire(ctx context.Context, slot uint32, mode LockMode, wait Patience) (*Lock, error) {
	if v.session == nil {
		return nil, ErrReadOnly
	}
	ok, err := v.locals.enter(ctx, v.clk, slot, wait)
	if err != nil {
		return nil, err
	}
	if !ok {
		me := v.self()
		return nil, &HeldError{Path: v.describe(ctx, slot), HostName: v.host, Slot: int(me.Slot), Generation: me.Generation}
	}
	l, err := v.acquireEntered(ctx, slot, mode, wait)
	if err != nil {
		v.locals.leave(slot)
		return nil, err
	}
	return l, nil
}

// tryAcquire takes the exclusive lock of a slot if it is free or its holders are
// dead, without waiting or breaking anybody; nil when it is not to be had.
func (v *Volume) tryAcquire(ctx context.Context, slot uint32) (*Lock, error) {
	ok, err := v.locals.enter(ctx, v.clk, slot, NoWait)
	if err != nil || !ok {
		return nil, err
	}
	l, _, err := v.take(ctx, slot, LockExclusive)
	if l == nil {
		v.locals.leave(slot)
	}
	return l, err
}

func (v *Volume) acquireEntered(ctx context.Context, slot uint32, mode LockMode, wait Patience) (*Lock, error) {
	start := v.clk.Now()
	suspect := start.Add(suspectAfter)
	if wait == NoWait {
		suspect = start
	}
	for pause := time.Millisecond; ; {
		l, blocked, err := v.take(ctx, slot, mode)
		if err != nil || l != nil {
			return l, err
		}
		if v.clk.Now() < suspect {
			if err := v.sleep(ctx, pause); err != nil {
				return nil, err
			}
			pause = min(2*pause, 20*time.Millisecond)
			continue
		}
		last := v.clk.Now().Sub(start) >= time.Duration(wait)
		if err := v.overcome(ctx, slot, blocked, last); err != nil {
			return nil, err
		}
		suspect = v.clk.Now().Add(suspectAfter)
	}
}

// blocker is a live holder in the way.
type blocker struct {
	holder Holder
	since  time.Time
}

// take tries once to lock a slot whose semaphore the caller has. It returns who is
// in the way if it cannot.
func (v *Volume) take(ctx context.Context, slot uint32, mode LockMode) (*Lock, blocker, error) {
	p := v.lockPlace(slot)
	for freed := false; ; {
		if err := ctx.Err(); err != nil {
			return nil, blocker{}, err
		}
		img, _, err := p.Read(ctx, v.dev)
		if err != nil {
			return nil, blocker{}, err
		}
		was, err := DecodeLock(p, img)
		if err != nil {
			return nil, blocker{}, err
		}
		next, holder, err := v.claimOf(ctx, *was, mode)
		if err != nil {
			return nil, blocker{}, err
		}
		if holder != nil {
			return nil, blocker{*holder, was.Since}, nil
		}
		// Not with ctx: a command that is under way must not be left behind.
		r, err := p.Swap(context.WithoutCancel(ctx), v.dev, img, next.Encode(img), v.nonce)
		switch {
		case err == nil:
			return &Lock{v: v, slot: slot, mode: mode, img: r.Image, record: next, before: *was}, blocker{}, nil
		case errors.Is(err, unit.ErrConflict), errors.Is(err, unit.ErrNotExecuted):
			continue
		case errors.Is(err, block.ErrBusy) && !freed:
			freed = true
			if err := v.breakSilent(ctx); err != nil {
				return nil, blocker{}, err
			}
			continue
		}
		return nil, blocker{}, errors.Join(err, v.disown(ctx, slot))
	}
}

// disown gives up a lock that may or may not have been taken, so that other hosts
// do not wait for a holder that does not know of it. A command that is still on its
// way takes no effect any more.
func (v *Volume) disown(ctx context.Context, slot uint32) error {
	img, err := v.supersede(context.WithoutCancel(ctx), v.lockPlace(slot), func([]byte) (bool, error) { return true, nil })
	if err != nil {
		return err
	}
	return v.giveUp(ctx, slot, img)
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

// overcome returns nil when the holder turned out dead or, unless this is the last
// attempt, alive; else a HeldError.
func (v *Volume) overcome(ctx context.Context, slot uint32, b blocker, last bool) error {
	h := b.holder
	err := v.session.Break(ctx, int(h.Slot), h.Generation)
	switch {
	case err == nil || (errors.Is(err, lease.ErrAlive) && !last):
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, lease.ErrLost), errors.Is(err, block.ErrClosed):
		return err // it is this mount that has ended
	}
	held := &HeldError{Path: v.describe(ctx, slot), Slot: int(h.Slot), Generation: h.Generation}
	if age := v.clk.Wall().Sub(b.since); age > 0 {
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
	defer l.v.locals.leave(l.slot)
	return l.v.giveUp(ctx, l.slot, l.img)
}

// giveUp takes this mount out of a slot's lock record, if it is there. img is the
// lock unit as it was last seen.
func (v *Volume) giveUp(ctx context.Context, slot uint32, img []byte) error {
	p := v.lockPlace(slot)
	me := v.self()
	_, err := v.changeFrom(context.WithoutCancel(ctx), p, img, func(img []byte) ([]byte, error) {
		r, err := DecodeLock(p, img)
		if err != nil {
			return nil, err
		}
		switch {
		case r.Mode == LockShared && slices.Contains(r.Shared, me):
			r.Shared = slices.DeleteFunc(r.Shared, func(h Holder) bool { return h == me })
			if len(r.Shared) == 0 {
				r.Mode = LockFree
			}
		case r.Mode == LockExclusive && r.Owner == me:
			r.Mode, r.Owner = LockFree, Holder{}
		default:
			return nil, nil // no longer ours: a fence took it
		}
		return r.Encode(img), nil
	})
	return err
}

// breakSilent breaks every host that gives no sign of life. It is for a unit whose
// bytes another process keeps busy: perhaps one that was stopped in the middle of a
// compare-and-write, which nobody else can finish.
func (v *Volume) breakSilent(ctx context.Context) error {
	hosts, err := v.Hosts(ctx)
	if err != nil {
		return err
	}
	for _, h := range hosts {
		live := h.Err == nil && (h.Register.Phase == lease.Live || h.Register.Phase == lease.Kill)
		if !live || h.Slot == v.session.Slot() {
			continue
		}
		err := v.session.Break(ctx, h.Slot, h.Register.Generation)
		if err != nil && !errors.Is(err, lease.ErrAlive) && !errors.Is(err, lease.ErrUnfenced) {
			return err
		}
	}
	return nil
}
