package lease_test

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"basalt/block"
	"basalt/block/simdev"
	"basalt/internal/clock"
	"basalt/lease"
)

// site is a LUN and the machines around it, in a synctest bubble: time passes by
// tick alone.
type site struct {
	t        *testing.T
	lun      *simdev.LUN
	area     lease.Area
	machines []*machine
	wg       sync.WaitGroup
}

// machine is one host with a clock of its own.
type machine struct {
	site   *site
	name   string
	clk    *clock.Fake
	nexus  *simdev.Handle
	dev    *wire
	fencer block.Fencer
	s      *lease.Session
	frozen bool
	owed   time.Duration // clock time that passed while frozen
	mu     sync.Mutex    // guards breaks
	breaks []lease.BreakReport
}

const dataOff = 4 << 20 // where the tests' own data lies

func testArea(slots int) lease.Area {
	return lease.Area{Volume: [16]byte{1, 2, 3}, HeartbeatOff: 1 << 20, RegisterOff: 2 << 20, StrideBytes: 4096, Slots: slots}
}

// inSite runs a test in a bubble with a formatted LUN.
func inSite(t *testing.T, slots int, run func(t *testing.T, x *site)) {
	t.Helper()
	inSiteOf(t, 512, slots, run)
}

// inSiteOf is inSite on a LUN with units of the given length.
func inSiteOf(t *testing.T, unitBytes, slots int, run func(t *testing.T, x *site)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		x := &site{t: t, lun: simdev.New(simdev.Options{SizeBytes: 16 << 20, LogicalBytes: unitBytes}), area: testArea(slots)}
		if err := lease.Format(t.Context(), x.lun.Host("mkfs"), x.area); err != nil {
			t.Fatal(err)
		}
		defer x.end()
		run(t, x)
	})
}

// end lets every machine go.
func (x *site) end() {
	for _, m := range x.machines {
		if m.s == nil {
			continue
		}
		m.thaw()
		m.dev.set(func(w *wire) { w.failBeats = false })
	}
	synctest.Wait()
	for _, m := range x.machines {
		if m.s != nil {
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			m.nexus.Kill()
			_ = m.s.Close(ctx)
		}
	}
	for range 200 {
		x.tick(100 * time.Millisecond)
	}
	x.wg.Wait()
}

// machine adds a host. Its fencer is its nexus.
func (x *site) machine(name string) *machine {
	n := x.lun.Host(name)
	m := &machine{site: x, name: name, clk: clock.NewFake(), nexus: n, dev: &wire{Device: n, area: x.area}, fencer: n}
	x.machines = append(x.machines, m)
	return m
}

// tick lets time pass on every machine that is not frozen.
func (x *site) tick(d time.Duration) {
	const step = 50 * time.Millisecond
	for ; d > 0; d -= step {
		for _, m := range x.machines {
			if m.frozen {
				m.owed += min(d, step)
				continue
			}
			m.clk.Advance(min(d, step))
		}
		synctest.Wait()
	}
}

func (m *machine) broke(r lease.BreakReport) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.breaks = append(m.breaks, r)
}

func (m *machine) options() lease.Options {
	return lease.Options{HostName: m.name, Lease: testLease, OnBreak: m.broke}
}

func (m *machine) claim(change ...func(o *lease.Options)) {
	m.site.t.Helper()
	if err := m.tryClaim(change...); err != nil {
		m.site.t.Fatalf("%s: %v", m.name, err)
	}
}

func (m *machine) tryClaim(change ...func(o *lease.Options)) error {
	opts := m.options()
	for _, c := range change {
		c(&opts)
	}
	return m.site.during(func(ctx context.Context) error { return m.claimWith(ctx, opts) })
}

// tryClaimNow claims without letting time pass.
func (m *machine) tryClaimNow(ctx context.Context) error { return m.claimWith(ctx, m.options()) }

// tryClaimUntilDead claims on a machine that dies while it does.
func (m *machine) tryClaimUntilDead() error {
	ctx, cancel := context.WithCancel(context.Background())
	done := m.site.start(func() error { return m.claimWith(ctx, m.options()) })
	m.site.tick(time.Second)
	cancel()
	m.site.tick(2 * testLease)
	return <-done
}

func (m *machine) claimWith(ctx context.Context, opts lease.Options) error {
	s, err := lease.Claim(ctx, m.dev, m.fencer, m.clk, slog.New(slog.DiscardHandler), m.site.area, opts)
	if err == nil {
		m.s = s
	}
	return err
}

// during runs f while time passes, and gives up after ten minutes of it.
func (x *site) during(f func(ctx context.Context) error) error {
	x.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	x.wg.Go(func() { done <- f(ctx) })
	synctest.Wait()
	for range 6000 {
		select {
		case err := <-done:
			return err
		default:
			x.tick(100 * time.Millisecond)
		}
	}
	x.t.Fatal("does not end")
	return nil
}

func (m *machine) breakHost(v *machine) error {
	m.site.t.Helper()
	slot, generation := v.s.Slot(), v.s.Generation()
	return m.site.during(func(ctx context.Context) error { return m.s.Break(ctx, slot, generation) })
}

// freeze stops the machine as a whole: clock, timers and I/O.
func (m *machine) freeze() {
	m.frozen = true
	m.nexus.Freeze()
}

func (m *machine) thaw() {
	if !m.frozen {
		return
	}
	m.frozen = false
	m.clk.Advance(m.owed)
	m.owed = 0
	m.nexus.Thaw()
	synctest.Wait()
}

func (m *machine) isLost() bool {
	select {
	case <-m.s.Lost():
		return true
	default:
		return false
	}
}

// changes is how many changes of this machine have reached the LUN.
func (m *machine) changes() int64 {
	s := m.nexus.Stats()
	return s.Writes + s.FUAs + s.CAWs + s.Zeroes + s.Discards + s.Flushes
}

func (x *site) register(slot int) lease.Register {
	x.t.Helper()
	views, err := lease.Observe(context.Background(), x.lun.Host("observer"), x.area)
	if err != nil {
		x.t.Fatal(err)
	}
	if views[slot].Err != nil {
		x.t.Fatal(views[slot].Err)
	}
	return views[slot].Register
}

// start runs an operation in the background and returns where its outcome comes.
func (x *site) start(op func() error) <-chan error {
	done := make(chan error, 1)
	x.wg.Go(func() { done <- op() })
	synctest.Wait()
	return done
}

func pending(done <-chan error) bool {
	select {
	case err := <-done:
		panic(err)
	default:
		return true
	}
}

// block512 is a logical block full of one byte.
func block512(fill byte) []byte {
	b := make([]byte, 512)
	for i := range b {
		b[i] = fill
	}
	return b
}

func (x *site) data() byte {
	b := make([]byte, 512)
	if err := x.lun.Host("reader").ReadAt(context.Background(), b, dataOff); err != nil {
		x.t.Fatal(err)
	}
	return b[0]
}

var errWire = errors.New("wire is cut")

// wire is the path from a machine to the LUN, with faults.
type wire struct {
	block.Device
	area lease.Area

	mu        sync.Mutex // guards what follows
	failBeats bool       // heartbeat writes do not arrive
	loseCAW   bool       // the next CompareAndWrite is executed, its reply lost
	beforeCAW func()     // runs once, before the next CompareAndWrite
	afterCAW  func()     // runs once, after the next CompareAndWrite
	readHold  chan struct{}
	atClaim   func() // runs once, before the next read of slot 0's register alone
	notShared bool
}

func (w *wire) set(change func(w *wire)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change(w)
}

func (w *wire) Geometry() block.Geometry {
	g := w.Device.Geometry()
	w.mu.Lock()
	defer w.mu.Unlock()
	g.SharedCAW = !w.notShared
	return g
}

func (w *wire) WriteAt(ctx context.Context, p []byte, offBytes int64) error {
	w.mu.Lock()
	cut := w.failBeats && offBytes >= w.area.HeartbeatOff && offBytes < w.area.HeartbeatOff+w.area.LenBytes()
	w.mu.Unlock()
	if cut {
		return errWire
	}
	return w.Device.WriteAt(ctx, p, offBytes)
}

func (w *wire) ReadAt(ctx context.Context, p []byte, offBytes int64) error {
	if offBytes == w.area.RegisterOff && len(p) == 512 {
		w.mu.Lock()
		at := w.atClaim
		w.atClaim = nil
		w.mu.Unlock()
		if at != nil {
			at()
		}
	}
	err := w.Device.ReadAt(ctx, p, offBytes)
	w.mu.Lock()
	hold := w.readHold
	w.mu.Unlock()
	if hold != nil && offBytes == dataOff {
		<-hold
	}
	return err
}

func (w *wire) CompareAndWrite(ctx context.Context, offBytes int64, compare, write []byte) error {
	w.mu.Lock()
	before, after, lose := w.beforeCAW, w.afterCAW, w.loseCAW
	w.beforeCAW, w.afterCAW, w.loseCAW = nil, nil, false
	w.mu.Unlock()
	if before != nil {
		before()
	}
	err := w.Device.CompareAndWrite(ctx, offBytes, compare, write)
	if after != nil {
		after()
	}
	if err == nil && lose {
		return errWire
	}
	return err
}

// paperFencer says yes to everything and does nothing, so that what a broken host
// still submits would be seen.
type paperFencer struct{}

func (paperFencer) Kinds() block.FenceKinds                          { return block.FenceAgent }
func (paperFencer) Guard(context.Context, int, uint32) error         { return nil }
func (paperFencer) Unguard(context.Context, int) error               { return nil }
func (paperFencer) Gone(context.Context, block.Holder) (bool, error) { return false, nil }
func (paperFencer) Fence(context.Context, block.Holder) error        { return nil }
