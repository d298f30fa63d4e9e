package thinprov_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"basalt/internal/clock"
	"basalt/thinprov"
)

// modelSnap is a snapshot with the content that it must show.
type modelSnap struct {
	uuid      [16]byte
	name      string
	want      []uint32
	published thinprov.Ref // object of the published snapshot, if any
	payload   []byte
	unsure    bool // its creation or deletion failed: it may exist or not
}

// modelDisk is a disk beside plain arrays that say what it must hold.
type modelDisk struct {
	*rig
	cells  []cell
	snaps  []*modelSnap
	origin *modelSnap
}

type model struct {
	t     testing.TB
	rng   *rand.Rand
	v     *volume
	disks []*modelDisk
	next  uint32 // sector content never used yet
	refs  uint32
	log   []string
	buf   []byte
}

func (m *model) note(format string, args ...any) { m.log = append(m.log, fmt.Sprintf(format, args...)) }

func (m *model) fatalf(format string, args ...any) {
	m.t.Helper()
	for _, l := range m.log[max(len(m.log)-40, 0):] {
		m.t.Log(l)
	}
	m.t.Fatalf(format, args...)
}

func (m *model) newRef() thinprov.Ref {
	m.refs++
	return thinprov.Ref{Slot: m.refs, Incarnation: 1}
}

// span picks a range of sectors, mostly short.
func (m *model) span(d *modelDisk) (int, int) {
	n := 1 + m.rng.IntN(24)
	switch m.rng.IntN(10) {
	case 0:
		n = 1 + m.rng.IntN(600)
	case 1, 2, 3:
		n = 8
	}
	n = min(n, len(d.cells))
	at := m.rng.IntN(len(d.cells) - n + 1)
	if m.rng.IntN(2) == 0 {
		at = at / 8 * 8
	}
	return at, n
}

func (m *model) write(d *modelDisk, fua bool) {
	at, n := m.span(d)
	content := make([]uint32, n)
	for i := range content {
		m.next++
		content[i] = m.next
	}
	p := make([]byte, n*sector)
	fill(p, content)
	m.note("%v write %d+%d fua %v ids %d..%d", d.ref, at, n, fua, content[0], content[n-1])
	allocated := m.allocates(d, at, n)
	write := d.WriteAt
	if fua {
		write = d.WriteFUA
	}
	err := write(context.Background(), p, int64(at)*sector)
	for i, id := range content {
		c := &d.cells[at+i]
		switch {
		case err != nil:
			c.maybe(id)
		case fua || allocated[i]:
			c.set(id)
			c.durable()
		default:
			c.set(id)
		}
	}
	m.lives(d, err)
}

// allocates tells which sectors of a range lie in blocks that are holes: writing
// them is durable once acknowledged.
func (m *model) allocates(d *modelDisk, at, n int) []bool {
	out := make([]bool, n)
	err := d.Map(context.Background(), int64(at)*sector, int64(n)*sector, func(r thinprov.Run) bool {
		for s := r.OffBytes / sector; s < (r.OffBytes+r.LenBytes)/sector; s++ {
			out[int(s)-at] = !r.Mapped
		}
		return true
	})
	if err != nil {
		m.fatalf("map: %v", err)
	}
	return out
}

func (m *model) zero(d *modelDisk, zero func(context.Context, int64, int64) error) {
	at, n := m.span(d)
	m.note("%v zero %d+%d", d.ref, at, n)
	err := zero(context.Background(), int64(at)*sector, int64(n)*sector)
	for i := range n {
		c := &d.cells[at+i]
		if err != nil {
			c.maybe(0)
			continue
		}
		c.set(0)
		if s := at + i; s/8*8 >= at && (s/8*8+8 <= at+n || at+n == len(d.cells)) {
			c.durable() // a whole block
		}
	}
	m.lives(d, err)
}

func (m *model) flush(d *modelDisk) {
	m.note("%v flush", d.ref)
	err := d.Flush(context.Background())
	if err == nil {
		for i := range d.cells {
			d.cells[i].durable()
		}
	}
	m.lives(d, err)
}

// lives accepts an error only from a host that was stopped.
func (m *model) lives(d *modelDisk, err error) {
	if err != nil && !errors.Is(err, errStopped) && !errors.Is(err, thinprov.ErrNoSpace) {
		m.fatalf("%v: %v", d.ref, err)
	}
}

func (m *model) head(d *modelDisk) []uint32 {
	want := make([]uint32, len(d.cells))
	for i, c := range d.cells {
		want[i] = c.cur
	}
	return want
}

func (m *model) snapshot(d *modelDisk) {
	if m.v.stopped() {
		return
	}
	m.next++
	s := &modelSnap{uuid: [16]byte{byte(m.next), byte(m.next >> 8), byte(m.next >> 16), 1}, name: fmt.Sprintf("s%d", m.next), want: m.head(d)}
	m.note("%v snapshot %s", d.ref, s.name)
	_, err := d.Snapshot(context.Background(), s.name, s.uuid)
	if err == nil {
		for i := range d.cells {
			d.cells[i].durable()
		}
	}
	s.unsure = err != nil
	d.snaps = append(d.snaps, s)
	m.lives(d, err)
}

func (m *model) deleteSnapshot(d *modelDisk) {
	if len(d.snaps) == 0 {
		return
	}
	s := d.snaps[m.rng.IntN(len(d.snaps))]
	m.note("%v delete %s", d.ref, s.name)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if m.rng.IntN(4) == 0 {
		cancel() // given up half way, or before it began
	}
	err := d.DeleteSnapshot(ctx, s.uuid)
	switch {
	case s.published != (thinprov.Ref{}) && errors.Is(err, thinprov.ErrPublished):
		return
	case errors.Is(err, context.Canceled):
		s.unsure = true
		if err := d.ResumeDeletion(context.Background()); err != nil {
			m.lives(d, err)
			return
		}
		if err := d.Checkpoint(context.Background()); err != nil { // whatever was logged is durable now
			m.lives(d, err)
			return
		}
		m.settleSnaps(d)
		return
	case err == nil:
		d.snaps = slices.DeleteFunc(d.snaps, func(x *modelSnap) bool { return x == s })
	default:
		s.unsure = true
	}
	m.lives(d, err)
}

// settleSnaps learns from the disk which of the unsure snapshots exist.
func (m *model) settleSnaps(d *modelDisk) {
	have := d.Snapshots()
	d.snaps = slices.DeleteFunc(d.snaps, func(s *modelSnap) bool {
		found := slices.ContainsFunc(have, func(x thinprov.Snapshot) bool { return x.UUID == s.uuid })
		if !found && !s.unsure {
			m.fatalf("%v: snapshot %s is gone", d.ref, s.name)
		}
		s.unsure = false
		return !found
	})
	if len(have) != len(d.snaps) {
		m.fatalf("%v: %d snapshots, want %d", d.ref, len(have), len(d.snaps))
	}
}

func (m *model) clone(d *modelDisk) {
	if len(d.snaps) == 0 || len(m.disks) >= 4 || m.v.stopped() {
		return
	}
	s := d.snaps[m.rng.IntN(len(d.snaps))]
	if s.payload == nil {
		if s.published == (thinprov.Ref{}) {
			s.published = m.newRef()
		}
		payload, err := d.Publish(context.Background(), s.uuid, s.published)
		if err != nil {
			m.lives(d, err)
			return
		}
		s.payload = payload
	}
	c := &modelDisk{rig: &rig{t: m.t, v: m.v, ref: m.newRef(), gen: 1}, origin: s, cells: make([]cell, len(s.want))}
	m.note("%v clone %s to %v", d.ref, s.name, c.ref)
	opts := thinprov.CreateOptions{UUID: [16]byte{byte(c.ref.Slot), 3}}
	if err := thinprov.CreateClone(context.Background(), c.store(), clock.NewFake(), s.payload, s.published, opts); err != nil {
		m.lives(d, err)
		return
	}
	for i, id := range s.want {
		c.cells[i].cur = id
	}
	if m.v.stopped() {
		return
	}
	m.v.mu.Lock()
	m.v.revive() // a death that was to come does not
	m.v.mu.Unlock()
	c.open()
	m.disks = append(m.disks, c)
}

// buffer is reused from read to read.
func (m *model) buffer(n int) []byte {
	if cap(m.buf) < n {
		m.buf = make([]byte, n)
	}
	return m.buf[:n]
}

// verify reads a disk and its snapshots, and returns what the disk holds.
func (m *model) verify(d *modelDisk) []uint32 {
	p := m.buffer(len(d.cells) * sector)
	if err := d.ReadAt(context.Background(), p, 0); err != nil {
		m.fatalf("%v: read: %v", d.ref, err)
	}
	have := ids(p)
	for i, id := range have {
		if !d.cells[i].allows(id) || len(d.cells[i].alts) == 0 && d.cells[i].cur != id {
			m.fatalf("%v: sector %d holds %d, want %d or one of %v", d.ref, i, id, d.cells[i].cur, d.cells[i].alts)
		}
	}
	for _, s := range d.snaps {
		m.verifySnap(d, s)
	}
	return have
}

func (m *model) verifySnap(d *modelDisk, s *modelSnap) {
	view, err := d.View(context.Background(), s.uuid)
	if s.payload != nil && m.rng.IntN(2) == 0 {
		if err == nil {
			view.Close()
		}
		view, err = thinprov.OpenView(context.Background(), &object{v: m.v, ref: s.published}, s.payload)
	}
	if err != nil {
		m.fatalf("%v: view of %s: %v", d.ref, s.name, err)
	}
	p := m.buffer(len(s.want) * sector)
	if err := view.ReadAt(context.Background(), p, 0); err != nil {
		m.fatalf("%v: read of %s: %v", d.ref, s.name, err)
	}
	for i, id := range ids(p) {
		if s.want[i] != id {
			m.fatalf("%v: sector %d of %s holds %d, want %d", d.ref, i, s.name, id, s.want[i])
		}
	}
	view.Close()
}

// restart ends all disks, by a power failure or a kill or in order, and opens them
// again.
func (m *model) restart(kind int) {
	m.note("restart %d", kind)
	if kind == 0 && !m.v.stopped() {
		m.v.mu.Lock()
		m.v.revive() // a death that was to come does not
		m.v.mu.Unlock()
	}
	for _, d := range m.disks {
		switch {
		case kind == 0 && !m.v.stopped():
			d.close()
		default:
			d.stop()
		}
	}
	m.v.mu.Lock()
	m.v.revive()
	m.v.mu.Unlock()
	if kind == 2 {
		m.v.crash(m.rng)
	}
	for _, d := range m.disks {
		checkClean(m.t, m.v, d.ref)
		if m.t.Failed() {
			m.fatalf("%v is damaged", d.ref)
		}
		d.open()
		m.settleSnaps(d)
		for i, id := range m.verify(d) { // what is read once stays
			d.cells[i] = cell{cur: id}
		}
	}
}

func (v *volume) stopped() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.stopAt > 0 && v.ops >= v.stopAt
}

func (m *model) step() {
	d := m.disks[m.rng.IntN(len(m.disks))]
	ctx := context.Background()
	switch k := m.rng.IntN(100); {
	case k < 42:
		m.write(d, false)
	case k < 47:
		m.write(d, true)
	case k < 57:
		m.zero(d, d.Discard)
	case k < 62:
		m.zero(d, d.WriteZeroes)
	case k < 70:
		m.flush(d)
	case k < 77:
		m.snapshot(d)
	case k < 83:
		m.deleteSnapshot(d)
	case k < 86:
		m.clone(d)
	case k < 90:
		m.note("%v checkpoint", d.ref)
		m.lives(d, d.Checkpoint(ctx))
	case k < 92:
		if !m.v.stopped() {
			m.verify(d)
		}
	case k < 95:
		m.restart(m.rng.IntN(3))
	default: // the host dies during one of the next operations
		m.v.mu.Lock()
		if m.v.stopAt == 0 {
			m.v.ops, m.v.stopAt, m.v.stopTorn = 0, 1+m.rng.IntN(12), rand.New(rand.NewPCG(m.rng.Uint64(), 3))
		}
		m.v.mu.Unlock()
	}
	if m.v.stopped() {
		m.restart(1 + m.rng.IntN(2))
	}
}

// fragment writes every other block, so that the map has several leaves.
func (m *model) fragment(d *modelDisk) {
	p := make([]byte, page)
	for at := 0; at+16 <= len(d.cells); at += 16 {
		content := make([]uint32, 8)
		for i := range content {
			m.next++
			content[i] = m.next
			d.cells[at+i].cur = m.next
		}
		fill(p, content)
		d.write(int64(at)*sector, p)
	}
}

// runModel drives random operations, kills and power failures from one seed.
func runModel(t testing.TB, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 99))
	m := &model{t: t, rng: rng, v: newVolume(96)}
	if rng.IntN(3) == 0 {
		m.v.logical = 4096
	}
	size := int64(2<<20 + 1536)
	if m.v.logical == 4096 {
		size = 2<<20 + 4096
	}
	d := &modelDisk{rig: newRig(t, m.v, m.newRef(), size), cells: make([]cell, size/sector)}
	m.disks = []*modelDisk{d}
	if rng.IntN(4) == 0 {
		m.fragment(d)
	}
	steps := 60
	if seed%40 == 0 {
		steps = 500 // the log wraps around
	}
	for range steps {
		m.step()
	}
	m.restart(0)
	for _, d := range m.disks {
		d.close()
		checkClean(t, m.v, d.ref)
	}
}

// TestModel compares disks with plain arrays over many seeds. THINPROV_SEED runs
// one, THINPROV_SEEDS says how many.
func TestModel(t *testing.T) {
	if s := os.Getenv("THINPROV_SEED"); s != "" {
		seed, err := strconv.ParseUint(s, 0, 64)
		if err != nil {
			t.Fatal(err)
		}
		runModel(t, seed)
		return
	}
	seeds := uint64(1000)
	if s := os.Getenv("THINPROV_SEEDS"); s != "" {
		n, err := strconv.ParseUint(s, 0, 64)
		if err != nil {
			t.Fatal(err)
		}
		seeds = n
	} else if testing.Short() || raceEnabled {
		seeds = 100
	}
	var next atomic.Uint64
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for seed := next.Add(1); seed <= seeds && !t.Failed(); seed = next.Add(1) {
				t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) { runModel(t, seed) })
			}
		})
	}
	workers.Wait()
	t.Logf("%d seeds; repeat one with THINPROV_SEED=N", seeds)
}
