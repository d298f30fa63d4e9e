package lease_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"basalt/block"
	"basalt/block/unit"
	"basalt/internal/clock"
	"basalt/lease"
)

// The model runs Holder and Breaker of several hosts over simulated registers,
// heartbeats and a fence, with every I/O delayed, failed or late at random, hosts
// that freeze and die, clocks that drift, and breakers that are dropped half way.
const (
	modelTick   = 10 * time.Millisecond
	modelLease  = 800 * time.Millisecond
	modelPeriod = 100 * time.Millisecond
	modelHosts  = 4
	modelSlots  = 3
	modelStorm  = 10 * time.Second // with faults
	modelCalm   = 15 * time.Second // without
	modelLate   = 3 * modelLease   // the latest that an I/O lands
	modelDrain  = 4 * modelLease
)

var errTimeout = errors.New("no answer")

type modelSlot struct {
	register []byte // whole unit
	beat     lease.Heartbeat
	author   *modelHost // of the KILL in place
	fenced   map[uint32]bool
	killed   map[uint32]bool // KILL of the generation was in place at some time
}

type modelOp struct {
	submitted, landed  bool
	landAt, answerAt   time.Duration
	notAfter           clock.Instant
	land               func() // at the device
	answer             func() // in the host
	tooLate            func() // in the host, instead of submitting
	never              bool   // lost on the way
	late               bool   // lands after its answer
	failed             bool
	orphan             bool // its host does not wait for it any more
	answerDue, noDelay bool
}

type model struct {
	t     *testing.T
	seed  uint64
	rng   *rand.Rand
	now   time.Duration
	calm  bool
	slots []*modelSlot
	hosts []*modelHost
	ops   []*modelOp
	nonce uint64
	done  int // generations broken
	back  int // KILLs withdrawn
}

type modelHost struct {
	m        *model
	id       int
	offset   clock.Instant
	drift    float64
	frozen   time.Duration // until
	stalled  time.Duration // its I/O is slow until
	crashed  bool
	claiming bool

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

func (m *model) failf(format string, args ...any) {
	m.t.Helper()
	m.t.Fatalf("seed %#x at %v: %s", m.seed, m.now, fmt.Sprintf(format, args...))
}

func (m *model) random() uint64 { m.nonce++; return m.nonce }

func (m *model) chance(p float64) bool { return !m.calm && m.rng.Float64() < p }

func (m *model) image(old []byte, r lease.Register) []byte {
	img := make([]byte, lease.RegisterBytes)
	version := uint64(1)
	if old != nil {
		copy(img, old)
		version = binary.LittleEndian.Uint64(old[8:]) + 1
	}
	r.EncodeInto(img)
	binary.LittleEndian.PutUint64(img[8:], version)
	binary.LittleEndian.PutUint64(img[16:], m.random())
	return img
}

func (m *model) decode(img []byte) lease.Register {
	r, err := lease.DecodeRegister(img)
	if err != nil {
		m.failf("register does not decode: %v", err)
	}
	return r
}

func (s *modelSlot) clear(m *model) {
	s.register = m.image(nil, lease.Register{})
	s.fenced, s.killed = make(map[uint32]bool), make(map[uint32]bool)
}

// swap executes one compare-and-write of a register and checks what it means.
func (m *model) swap(h *modelHost, slot int, old []byte, next lease.Register) ([]byte, bool) {
	s := m.slots[slot]
	if string(s.register) != string(old) {
		return s.register, false
	}
	before := m.decode(old)
	switch {
	case before.Phase == lease.Kill && next.Phase == lease.Live:
		if s.author != h {
			m.failf("host %d withdraws a KILL of another", h.id)
		}
		m.back++
	case next.Phase == lease.Kill:
		s.author = h
		s.killed[next.Generation] = true
	case next.Phase == lease.Done:
		if !s.fenced[next.Generation] && !h.person {
			m.failf("host %d writes DONE over slot %d generation %d without a fence", h.id, slot, next.Generation)
		}
		m.mustBeOver(slot, next.Generation, "DONE")
		m.done++
	}
	s.register = m.image(old, next)
	return s.register, true
}

// mustBeOver fails when the generation's holder believes in its lease.
func (m *model) mustBeOver(slot int, generation uint32, what string) {
	for _, o := range m.hosts {
		if o.slot == slot && o.generation == generation && o.valid() {
			m.failf("%s of slot %d generation %d while host %d has a lease for another %v", what, slot, generation, o.id, o.until.Sub(o.local()))
		}
	}
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
		op.late, op.failed = true, true // the initiator times out, the device does not
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
				op.orphan, op.landed = true, true
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
	h.m.ops = append(h.m.ops, &modelOp{submitted: true, landAt: landAt, orphan: true, land: func() {
		if m.slots[slot].fenced[generation] {
			return
		}
		if m.decode(m.slots[slot].register).Dead(generation) {
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
	r := h.m.decode(h.m.slots[victim].register)
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

var dbg bool

func (h *modelHost) stepBreaker(ev lease.BreakerEvent) {
	a := h.breaker.Step(h.local(), ev)
	if dbg && h.m.calm {
		fmt.Printf("%v h%d valid=%v victim=%d ev=%d gone=%v leased=%v err=%v -> %d %v until=%v\n", h.m.now, h.id, h.valid(), h.victim, ev.Kind, ev.Gone, ev.Poll.Leased, ev.Err, a.Kind, a.Err, a.Until.Sub(h.local()))
	}
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
	// Two reads; the second lands some time after the first.
	second := &modelOp{submitted: true, orphan: true}
	op := h.issue(&modelOp{land: func() {
		img = m.slots[slot].register
		p.Heartbeat = m.slots[slot].beat
		_ = second
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
				m.slots[slot].register = m.image(a.Old, m.decode(a.Old))
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

func (m *model) tick() {
	m.now += modelTick
	keep := m.ops[:0]
	for _, op := range m.ops {
		if op.submitted && !op.landed && m.now >= op.landAt {
			op.landed = true
			if !op.never {
				op.land()
			}
		}
		if !op.landed {
			keep = append(keep, op)
		}
	}
	m.ops = keep
	for _, i := range m.rng.Perm(len(m.hosts)) {
		m.hosts[i].run()
	}
	for i, a := range m.hosts {
		for _, b := range m.hosts[:i] {
			if a.slot == b.slot && a.valid() && b.valid() {
				m.failf("hosts %d and %d both have a lease on slot %d", a.id, b.id, a.slot)
			}
		}
	}
}

func runModel(t *testing.T, seed uint64) *model {
	m := &model{t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 1))}
	for range modelSlots {
		s := &modelSlot{}
		s.clear(m)
		m.slots = append(m.slots, s)
	}
	for i := range modelHosts {
		m.hosts = append(m.hosts, &modelHost{
			m: m, id: i, slot: -1,
			offset: clock.Instant(m.rng.Int64N(int64(time.Hour))),
			drift:  (m.rng.Float64() - 0.5) * 0.0099,
		})
	}
	for m.now < modelStorm {
		m.tick()
	}
	m.calm = true
	for m.now < modelStorm+modelCalm {
		m.tick()
	}
	m.mustBeSettled()
	return m
}

// mustBeSettled: once faults have ended, no dead host's generation is left.
func (m *model) mustBeSettled() {
	anyValid := false
	for _, h := range m.hosts {
		anyValid = anyValid || h.valid()
	}
	if !anyValid {
		return // nobody is left to break anything
	}
	for i, s := range m.slots {
		r := m.decode(s.register)
		if r.Phase != lease.Live && r.Phase != lease.Kill {
			continue
		}
		alive := false
		for _, h := range m.hosts {
			alive = alive || h.slot == i && h.generation == r.Generation && h.valid()
		}
		if !alive {
			m.failf("slot %d generation %d is left %v with no holder", i, r.Generation, r.Phase)
		}
	}
}

func TestNoLeaseOutlivesItsGenerationUnderAnySchedule(t *testing.T) {
	t.Parallel()
	seeds := uint64(2000)
	if testing.Short() {
		seeds = 200
	}
	var broken, withdrawn int
	for seed := range seeds {
		m := runModel(t, seed)
		broken += m.done
		withdrawn += m.back
	}
	t.Logf("%d seeds: %d generations broken, %d KILLs withdrawn", seeds, broken, withdrawn)
	if broken == 0 || withdrawn == 0 {
		t.Fatal("the schedules reach no break or no withdrawal")
	}
}
