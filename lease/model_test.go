package lease_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"basalt/internal/clock"
	"basalt/lease"
)

// The model runs Holder and Breaker of several hosts over simulated registers,
// heartbeats and a fence, with every I/O delayed, failed or late at random, hosts
// that freeze and die, clocks that drift, and breakers that are dropped half way.
const (
	modelTick   = 20 * time.Millisecond
	modelLease  = 800 * time.Millisecond
	modelPeriod = 100 * time.Millisecond
	modelHosts  = 4
	modelSlots  = 3
	modelStorm  = 8 * time.Second // with faults
	modelCalm   = 9 * time.Second // without
	modelLate   = 3 * modelLease  // the latest that an I/O lands
	modelDrain  = 4 * modelLease
)

var errTimeout = errors.New("no answer")

type modelSlot struct {
	register []byte         // whole unit
	decoded  lease.Register // the same
	beat     lease.Heartbeat
	author   *modelHost // of the KILL in place
	fenced   map[uint32]bool
	killed   map[uint32]bool // KILL of the generation was in place at some time
}

type modelOp struct {
	submitted, landed bool
	landAt, answerAt  time.Duration
	notAfter          clock.Instant
	land              func() // at the device
	answer            func() // in the host
	tooLate           func() // in the host, instead of submitting
	never             bool   // lost on the way
	failed            bool   // the host is told nothing of it, whether or when it lands
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

func (s *modelSlot) put(m *model, img []byte) { s.register, s.decoded = img, m.decode(img) }

func (s *modelSlot) clear(m *model) {
	s.put(m, m.image(nil, lease.Register{}))
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
	s.put(m, m.image(old, next))
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
		r := s.decoded
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
