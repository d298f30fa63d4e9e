package lease

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"basalt/block"
	"basalt/internal/clock"
)

// Claim takes a slot of the area (rule R8) and returns once its lease is valid.
// The session then owns dev; on an error the caller still does, though it may be
// closed if the slot could not be given back.
//
// A generation of the same host name that is proven gone is broken on the way. A
// server also breaks an earlier server of its name, watching it for a full
// window; if that one is alive, Claim returns ErrNameInUse, and ErrUnfenced if it
// is silent and cannot be cut off. Two servers of one
// name that start at the same moment may both be refused. On a device without
// compare-and-write among hosts every other holder must be dead, else
// ErrNotShared. ErrNoSlot: all slots are taken by holders that cannot be broken.
func Claim(ctx context.Context, dev block.Device, fencer block.Fencer, clk clock.Clock, log *slog.Logger, area Area, opts Options) (*Session, error) {
	opts = opts.withDefaults()
	if err := opts.validate(); err != nil {
		return nil, err
	}
	if err := area.validate(dev.Geometry()); err != nil {
		return nil, err
	}
	p := peer{raw: dev, fencer: fencer, clk: clk, log: log, area: area, opts: opts}
	s, err := p.claimAny(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.settle(ctx); err != nil {
		return nil, errors.Join(err, s.undo(ctx))
	}
	return s, nil
}

// undoBudget bounds the release of a slot that was claimed in vain, in leases.
const undoBudget = 1

// undo releases a session whose claimer does not want it, leaving the device open
// as Claim promises.
func (s *Session) undo(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoBudget*s.opts.Lease)
	defer cancel()
	return s.closeSlot(ctx)
}

// settle waits for the lease and sees to the claimer's own past.
func (s *Session) settle(ctx context.Context) error {
	select {
	case <-s.first:
	case <-s.lost:
		return s.Err()
	case <-ctx.Done():
		return fmt.Errorf("lease: wait for the first heartbeat of slot %d: %w", s.slot, ctx.Err())
	}
	views, err := Observe(ctx, s.device, s.area)
	if err != nil {
		return err
	}
	for _, v := range views {
		if v.Slot == s.slot || v.Register.Phase != Live && v.Register.Phase != Kill {
			continue
		}
		if err := s.settleWith(ctx, v); err != nil {
			return err
		}
	}
	return nil
}

func (s *Session) settleWith(ctx context.Context, v SlotView) error {
	r := v.Register
	namesake := r.HostName == s.opts.HostName
	switch {
	case !s.raw.Geometry().SharedCAW && slices.Contains(s.opts.Vouched, r.HostName):
		return s.ConfirmDown(ctx, v.Slot, r.Generation)
	case !s.raw.Geometry().SharedCAW:
		if err := s.Break(ctx, v.Slot, r.Generation); err != nil {
			return fmt.Errorf("%w: %w", ErrNotShared, err)
		}
	case namesake && s.opts.Server && r.Server:
		err := s.Break(ctx, v.Slot, r.Generation)
		if errors.Is(err, ErrAlive) {
			return fmt.Errorf("%w: %w", ErrNameInUse, err)
		}
		return err
	case namesake:
		gone, err := s.gone(ctx, v.Slot, r)
		if err == nil && gone {
			err = s.Break(ctx, v.Slot, r.Generation)
		}
		if err != nil {
			s.log.Warn("an earlier generation of this host stays", "other", v.Slot, "err", err)
		}
	}
	return nil
}

// gone asks the fencer for proof about the holder of a register.
func (p peer) gone(ctx context.Context, slot int, r Register) (bool, error) {
	if r.Fencers&p.fencer.Kinds() == 0 {
		return false, nil
	}
	return p.fencer.Gone(ctx, holderOf(slot, r))
}

// maxClaimRounds bounds how often all slots are tried against other claimers.
const maxClaimRounds = 4

// claimAny claims the first slot that it can get.
func (p peer) claimAny(ctx context.Context) (*Session, error) {
	var last error
	for range maxClaimRounds {
		views, err := Observe(ctx, p.raw, p.area)
		if err != nil {
			return nil, err
		}
		free := p.candidates(views)
		for _, v := range free {
			s, err := p.claimSlot(ctx, v.Slot)
			if err == nil {
				return s, nil
			}
			if !errors.Is(err, block.ErrBusy) {
				return nil, err
			}
			last = err
		}
		if len(free) == 0 {
			if err := p.makeRoom(ctx, views); err != nil {
				return nil, err
			}
		}
	}
	return nil, errors.Join(ErrNoSlot, last)
}

// candidates are the slots to try: those of this host's own past first, so that
// a host tends to stay in its slot.
func (p peer) candidates(views []SlotView) []SlotView {
	free := slices.DeleteFunc(slices.Clone(views), func(v SlotView) bool {
		return v.Err != nil || v.Register.Phase != Free && v.Register.Phase != Done
	})
	rank := func(v SlotView) int {
		if v.Register.HostName == p.opts.HostName {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(free, func(a, b SlotView) int { return cmp.Compare(rank(a), rank(b)) })
	return free
}

// claimSlot tries one slot. block.ErrBusy: try another.
func (p peer) claimSlot(ctx context.Context, slot int) (*Session, error) {
	cur, err := p.area.readRegister(ctx, p.raw, slot)
	if err != nil {
		return nil, err
	}
	if cur.reg.Phase != Free && cur.reg.Phase != Done || cur.reg.Generation == 1<<32-1 {
		return nil, fmt.Errorf("lease: claim slot %d: %w", slot, block.ErrBusy)
	}
	next := p.register(cur.reg)
	if err := p.fencer.Guard(ctx, slot, next.Generation); err != nil {
		return nil, fmt.Errorf("lease: guard slot %d: %w", slot, err)
	}
	now, err := p.area.swapRegister(ctx, p.raw, slot, cur.img, next, p.opts.Nonce)
	// A doubtful conflict may hide success: somebody may have called us already.
	if err == nil || isChanged(err) && now.img != nil && now.reg.Phase == Live && now.reg.Generation == next.Generation && now.reg.Claim == next.Claim {
		return newSession(ctx, p, slot, next), nil
	}
	// Nothing has been written under this guard but the claim itself, and should
	// that still land, it is a generation without a heartbeat.
	if uerr := p.fencer.Unguard(context.WithoutCancel(ctx), slot); uerr != nil {
		return nil, errors.Join(err, fmt.Errorf("lease: unguard slot %d: %w", slot, uerr))
	}
	if isChanged(err) {
		return nil, fmt.Errorf("lease: claim slot %d: %w: %w", slot, block.ErrBusy, err)
	}
	return nil, fmt.Errorf("lease: claim slot %d: %w", slot, err)
}

// register is the claimer's register after the given one.
func (p peer) register(before Register) Register {
	return Register{
		Generation: before.Generation + 1,
		Phase:      Live,
		Server:     p.opts.Server,
		HostID:     p.opts.HostID,
		Process:    p.opts.Process,
		Fencers:    p.fencer.Kinds(),
		Lease:      p.opts.Lease,
		ClaimedAt:  p.clk.Wall(),
		Claim:      p.opts.Nonce(),
		Address:    p.opts.Address,
		HostName:   p.opts.HostName,
	}
}

// makeRoom breaks one dead holder when every slot is taken. The breaker holds no
// slot, so it has no lease that could end while it watches.
func (p peer) makeRoom(ctx context.Context, before []SlotView) error {
	suspects, err := p.silent(ctx, before)
	if err != nil {
		return err
	}
	failed := ErrNoSlot
	for _, v := range suspects {
		io := breakIO{peer: p, dev: p.raw, leased: func() (bool, uint64) { return true, 0 }}
		report := io.run(ctx, NewBreaker(BreakerConfig{
			Slot: v.Slot, Generation: v.Register.Generation, Period: p.opts.Period, Kinds: p.fencer.Kinds(),
		}, Window{}))
		if report.Err == nil {
			return nil
		}
		failed = errors.Join(failed, report.Err)
	}
	return failed
}

// silent lists the holders that are proven gone, or else those whose heartbeats
// do not change for the longest advertised lease. It only saves watching the
// living: the break watches again.
func (p peer) silent(ctx context.Context, before []SlotView) ([]SlotView, error) {
	var gone []SlotView
	var longest time.Duration
	for _, v := range before {
		ok, err := p.gone(ctx, v.Slot, v.Register)
		if err != nil {
			p.log.Debug("whether the holder is gone cannot be told", "slot", v.Slot, "err", err)
		}
		if ok && err == nil {
			gone = append(gone, v)
		}
		longest = max(longest, v.Register.Lease)
	}
	if len(gone) > 0 {
		return gone, nil
	}
	timer := p.clk.NewTimer(windowOf(longest))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return nil, errors.Join(ErrNoSlot, ctx.Err())
	}
	after, err := Observe(ctx, p.raw, p.area)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(after, func(v SlotView) bool {
		was := before[v.Slot]
		return v.Heartbeat != was.Heartbeat || v.Register.Claim != was.Register.Claim
	}), nil
}
