package lease_test

import (
	"fmt"
	"time"

	"basalt/block"
	"basalt/block/unit"
	"basalt/internal/clock"
	"basalt/lease"
)

// modelHost is one host of the model: a Holder, at times a Breaker, and the fate
// of their I/O.
type modelHost struct {
	m       *model
	id      int
	offset  clock.Instant
	drift   float64
	frozen  time.Duration // until
	stalled time.Duration // its I/O is slow until
	crashed bool

	slot       int
	generation uint32
	claim      uint64
	holder     *lease.Holder
	until      clock.Instant
	wake       clock.Instant
	op         *modelOp
	lost       bool
	lapses     uint64
	condemned  bool // has read KILL or another generation

	breaker   *lease.Breaker
	victim    int
	victimGen uint32
	person    bool
	bop       *modelOp
	bwake     clock.Instant
}

func (h *modelHost) local() clock.Instant {
	return h.offset + clock.Instant(float64(h.m.now)*(1+h.drift))
}

func (h *modelHost) valid() bool {
	return h.holder != nil && !h.crashed && !h.lost && h.local() < h.until
}

func (h *modelHost) delay() time.Duration {
	m := h.m
	switch {
	case m.now < h.stalled || m.chance(0.02):
		return time.Duration(m.rng.Int64N(int64(modelLate)))
	case m.chance(0.2):
		return time.Duration(m.rng.Int64N(int64(2 * modelPeriod)))
	}
	return time.Duration(m.rng.Int64N(int64(modelPeriod / 3)))
}

// issue queues an I/O of the host. It is submitted when the host next runs.
func (h *modelHost) issue(op *modelOp) *modelOp {
	h.m.ops = append(h.m.ops, op)
	return op
}

// submit fixes the fate of an operation.
func (h *modelHost) submit(op *modelOp) {
	m := h.m
	op.submitted = true
	op.landAt = m.now + h.delay()
	op.answerAt = op.landAt + h.delay()/4
	switch {
	case m.chance(0.01):
		op.never, op.failed = true, true
	case m.chance(0.02):
		op.failed = true // the initiator times out, the device does not
		op.answerAt = m.now + (op.landAt-m.now)/2
	}
}

func (h *modelHost) run() {
	m := h.m
	if h.crashed || m.now < h.frozen {
		return
	}
	for _, p := range []**modelOp{&h.op, &h.bop} {
		op := *p
		if op == nil {
			continue
		}
		if !op.submitted {
			if op.tooLate != nil && h.local() > op.notAfter {
				*p = nil
				op.submitted, op.landed = true, true
				op.tooLate()
				continue
			}
			h.submit(op)
		}
		if m.now >= op.answerAt && (op.landed || op.failed) {
			*p = nil
			op.answer()
		}
	}
	switch {
	case h.holder == nil && h.op == nil:
		h.tryClaim()
	case h.holder != nil && !h.lost && h.local() >= h.wake:
		h.step(lease.HolderEvent{Kind: lease.HolderTick})
	}
	if h.breaker != nil && h.bop == nil && h.local() >= h.bwake {
		h.stepBreaker(lease.BreakerEvent{Kind: lease.BreakerTick})
	}
	if h.valid() {
		h.writeData()
	}
	h.misbehave()
}

// misbehave is where hosts freeze, die, lose their nerve and start to break.
func (h *modelHost) misbehave() {
	m := h.m
	switch {
	case m.chance(0.004):
		h.frozen = m.now + time.Duration(m.rng.Int64N(int64(3*modelLease)))
	case m.chance(0.004):
		h.stalled = m.now + time.Duration(m.rng.Int64N(int64(3*modelLease)))
	case m.chance(0.0005):
		h.crashed = true
	case m.chance(0.001):
		h.breaker, h.bop = nil, nil // dies at this step, for all that others see
	}
	if h.breaker == nil && h.valid() && (m.calm || m.chance(0.05)) {
		h.startBreak(m.rng.IntN(modelSlots), m.chance(0.2))
	}
	if h.lost && h.op == nil && m.rng.Float64() < 0.05 {
		h.holder, h.lost, h.breaker, h.bop, h.condemned = nil, false, nil, nil, false
	}
}

// writeData submits a write through the gate that may land late; the gate's own
// second look is not modelled.
func (h *modelHost) writeData() {
	m := h.m
	slot, generation := h.slot, h.generation
	landAt := m.now + h.delay()
	h.m.ops = append(h.m.ops, &modelOp{submitted: true, landAt: landAt, land: func() {
		if m.slots[slot].fenced[generation] {
			return
		}
		if m.slots[slot].decoded.Dead(generation) {
			m.failf("a write of slot %d generation %d takes effect after its death", slot, generation)
		}
	}})
}

func (h *modelHost) tryClaim() {
	m := h.m
	slot := m.rng.IntN(modelSlots)
	img := m.slots[slot].register
	r := m.decode(img)
	if r.Phase != lease.Free && r.Phase != lease.Done || m.rng.Float64() < 0.9 {
		return
	}
	next := lease.Register{
		Generation: r.Generation + 1, Phase: lease.Live, Lease: modelLease, HostName: fmt.Sprint("host", h.id),
		Claim: m.random(), Fencers: block.FencePR,
	}
	ok := false
	h.op = h.issue(&modelOp{
		land: func() { _, ok = m.swap(h, slot, img, next) },
	})
	op := h.op
	op.answer = func() {
		if op.failed || !ok {
			return // may have landed, and is then nobody's
		}
		h.slot, h.generation, h.claim, h.until = slot, next.Generation, next.Claim, 0
		h.holder = lease.NewHolder(lease.HolderConfig{Generation: h.generation, Claim: h.claim, Lease: modelLease, Period: modelPeriod}, h.local())
		h.wake = h.local()
	}
}

func (h *modelHost) step(ev lease.HolderEvent) {
	m := h.m
	if ev.Kind == lease.HolderRead && ev.Err == nil && (ev.Register.Phase != lease.Live || ev.Register.Claim != h.claim) {
		h.condemned = true
	}
	for _, a := range h.holder.Step(h.local(), ev) {
		switch a.Kind {
		case lease.WriteHeartbeat:
			if h.condemned || h.op != nil {
				m.failf("host %d writes after it read KILL, or has two I/Os", h.id)
			}
			h.beat(a)
		case lease.ReadOwn:
			h.readOwn()
		case lease.ExtendLease:
			if h.local() >= h.until {
				h.lapses++
			}
			h.until = a.Until
		case lease.LoseLease:
			h.lost = true
		case lease.Wake:
			h.wake = a.Until
		case lease.LapseLease, lease.Called:
		}
	}
}

func (h *modelHost) beat(a lease.HolderAction) {
	m := h.m
	slot, b := h.slot, lease.Heartbeat{Generation: h.generation, Sequence: a.Sequence, Nonce: m.random()}
	fenced := false
	op := h.issue(&modelOp{notAfter: a.NotAfter, land: func() {
		if fenced = m.slots[slot].fenced[b.Generation]; !fenced {
			m.slots[slot].beat = b
		}
	}})
	op.tooLate = func() { h.step(lease.HolderEvent{Kind: lease.HolderWrote, Err: lease.ErrStale}) }
	op.answer = func() {
		ev := lease.HolderEvent{Kind: lease.HolderWrote}
		switch {
		case op.failed:
			ev.Err = errTimeout
		case fenced:
			ev.Err = block.ErrFenced
		}
		h.step(ev)
	}
	h.op = op
}

func (h *modelHost) readOwn() {
	m := h.m
	slot := h.slot
	var img []byte
	op := h.issue(&modelOp{land: func() { img = m.slots[slot].register }})
	op.answer = func() {
		if op.failed {
			h.step(lease.HolderEvent{Kind: lease.HolderRead, Err: errTimeout})
			return
		}
		h.step(lease.HolderEvent{Kind: lease.HolderRead, Register: m.decode(img)})
	}
	h.op = op
}

func (h *modelHost) startBreak(victim int, person bool) {
	r := h.m.slots[victim].decoded
	if victim == h.slot || r.Phase != lease.Live && r.Phase != lease.Kill {
		return
	}
	cfg := lease.BreakerConfig{
		Slot: victim, Generation: r.Generation, BySlot: uint8(h.slot), ByGeneration: h.generation,
		Period: modelPeriod, Kinds: block.FencePR,
	}
	if person {
		cfg.Drain = modelDrain
	}
	h.victim, h.victimGen, h.person = victim, r.Generation, person
	h.breaker = lease.NewBreaker(cfg, lease.Window{})
	h.bwake = h.local()
}

func (h *modelHost) stepBreaker(ev lease.BreakerEvent) {
	a := h.breaker.Step(h.local(), ev)
	switch a.Kind {
	case lease.PollSlot:
		h.poll()
	case lease.WaitUntil:
		h.bwake = a.Until
	case lease.SwapRegister:
		h.change(a)
	case lease.FenceHolder:
		h.fence(a.Holder)
	case lease.EndBreak:
		h.breaker = nil
	}
}

// mine drops the answers of a breaker that is gone.
func (h *modelHost) mine(b *lease.Breaker, answer func()) func() {
	return func() {
		if h.breaker == b {
			answer()
		}
	}
}

func (h *modelHost) poll() {
	m := h.m
	slot := h.victim
	p := lease.Poll{Issued: h.local()}
	valid, lapses := h.valid(), h.lapses
	var img []byte
	op := h.issue(&modelOp{land: func() {
		img = m.slots[slot].register
		p.Heartbeat = m.slots[slot].beat
	}})
	op.answer = h.mine(h.breaker, func() {
		p.Done = h.local()
		p.Leased, p.Lapses = valid && h.valid() && lapses == h.lapses, h.lapses
		ev := lease.BreakerEvent{Kind: lease.Polled}
		if op.failed {
			p.Err = errTimeout
		} else {
			p.Image, p.Register = img, m.decode(img)
			ev.Gone = m.holderGone(slot, h.victimGen) && m.rng.IntN(4) == 0
		}
		ev.Poll = p
		h.stepBreaker(ev)
	})
	h.bop = op
}

// holderGone is the fencer's proof: the host died.
func (m *model) holderGone(slot int, generation uint32) bool {
	for _, o := range m.hosts {
		if o.slot == slot && o.generation == generation && o.holder != nil {
			return o.crashed
		}
	}
	return false
}

func (h *modelHost) change(a lease.BreakerAction) {
	m := h.m
	slot := h.victim
	var img []byte
	ok, executed := false, !m.chance(0.02)
	op := h.issue(&modelOp{land: func() {
		if !executed {
			// unit.Swap superseded it.
			if string(m.slots[slot].register) == string(a.Old) {
				m.slots[slot].put(m, m.image(a.Old, m.decode(a.Old)))
			}
			img = m.slots[slot].register
			return
		}
		img, ok = m.swap(h, slot, a.Old, a.Next)
	}})
	op.answer = h.mine(h.breaker, func() {
		ev := lease.BreakerEvent{Kind: lease.Swapped}
		switch {
		case op.failed:
			ev.Err = errTimeout
		case !executed:
			ev.Image, ev.Register, ev.Err = img, m.decode(img), unit.ErrNotExecuted
		case !ok:
			ev.Image, ev.Register, ev.Err = img, m.decode(img), unit.ErrConflict
		default:
			ev.Image, ev.Register = img, m.decode(img)
		}
		h.stepBreaker(ev)
	})
	h.bop = op
}

func (h *modelHost) fence(v block.Holder) {
	m := h.m
	refuse := m.chance(0.05)
	busy := m.chance(0.05)
	op := h.issue(&modelOp{land: func() {
		if refuse {
			return
		}
		m.mustBeOver(v.Slot, v.Generation, "fence")
		if !m.slots[v.Slot].killed[v.Generation] {
			m.failf("fence of slot %d generation %d before KILL", v.Slot, v.Generation)
		}
		m.slots[v.Slot].fenced[v.Generation] = true
	}})
	op.answer = h.mine(h.breaker, func() {
		var err error
		switch {
		case refuse:
			err = block.ErrNotSupported
		case busy:
			err = block.ErrBusy
		case op.failed:
			err = errTimeout
		}
		h.stepBreaker(lease.BreakerEvent{Kind: lease.Fenced, Err: err})
	})
	h.bop = op
}
