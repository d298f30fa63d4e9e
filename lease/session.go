package lease

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"basalt/block"
	"basalt/block/unit"
	"basalt/internal/clock"
)

// Session is one generation of one slot, from Claim to Close or until it is lost.
// It owns the device that Claim was given. Its methods may be called at once from
// several goroutines.
type Session struct {
	peer
	slot       int
	generation uint32
	claim      uint64
	claimedAt  time.Time
	device     *gated
	calls      chan struct{}
	first      chan struct{} // closed when the lease is valid for the first time
	lost       chan struct{} // closed when the generation is lost
	stop       chan struct{} // closed to end the heartbeats
	stopOnce   sync.Once
	ended      chan struct{} // closed when no goroutine of the session is left
	cancelIO   context.CancelFunc

	mu        sync.Mutex // guards what follows
	err       error      // why lost
	abandoned error      // why Close gave up waiting
	quiet     bool       // heartbeats have ended; abandoned is not looked at any more
	breaking  map[int]chan struct{}
}

// peer is what any host of an area works with, whether it holds a slot or not.
type peer struct {
	raw    block.Device
	fencer block.Fencer
	clk    clock.Clock
	log    *slog.Logger
	area   Area
	opts   Options
}

func newSession(ctx context.Context, p peer, slot int, reg Register) *Session {
	s := &Session{
		peer: p, slot: slot, generation: reg.Generation, claim: reg.Claim, claimedAt: reg.ClaimedAt,
		device:   &gated{raw: p.raw, gate: newGate(p.clk)},
		calls:    make(chan struct{}, 1),
		first:    make(chan struct{}),
		lost:     make(chan struct{}),
		stop:     make(chan struct{}),
		ended:    make(chan struct{}),
		breaking: make(map[int]chan struct{}),
	}
	s.log = p.log.With("slot", slot, "generation", reg.Generation)
	ctx, s.cancelIO = context.WithCancel(context.WithoutCancel(ctx))
	go s.live(ctx)
	return s
}

// Slot is the session's slot.
func (s *Session) Slot() int { return s.slot }

// Generation is the session's generation of its slot.
func (s *Session) Generation() uint32 { return s.generation }

// Device is the gate: the device for all I/O of this host. Its operations wait
// while the lease is in doubt, until ctx ends, and fail with ErrLost once the
// generation is lost; either may come after the device has executed them. Its
// Close refuses further I/O without closing the device.
func (s *Session) Device() block.Device { return s.device }

// Calls receives after others have called this slot (Session.Call); several calls
// may make one.
func (s *Session) Calls() <-chan struct{} { return s.calls }

// Lost is closed when the generation is lost for good.
func (s *Session) Lost() <-chan struct{} { return s.lost }

// Err is nil until Lost is closed, then wraps ErrLost and says why.
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Await returns nil while the lease is valid, waits while it is in doubt, and
// fails with ErrLost once the generation is gone. Whatever is told to anybody
// without an operation of the Device having been needed for it waits for this
// first: another host may own by now what the answer is about.
func (s *Session) Await(ctx context.Context) error {
	gate := s.device.gate
	for !gate.open() {
		if err := gate.wait(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (s *Session) setLost(err error) {
	s.mu.Lock()
	s.err = err
	s.mu.Unlock()
	s.device.gate.close(err)
	close(s.lost)
}

// abandon leaves a generation that cannot be closed in time to others to break.
// The session's goroutine closes the device once its I/O has ended.
func (s *Session) abandon(err error) {
	s.mu.Lock()
	s.abandoned = fmt.Errorf("%w: abandoned by Close: %w", ErrLost, err)
	late := s.quiet
	s.mu.Unlock()
	s.stopBeating()
	s.cancelIO()
	if late {
		<-s.ended
	}
}

// quieted ends the time in which abandon has an effect and returns the reason, if
// there was one.
func (s *Session) quieted() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.quiet = true
	return s.abandoned
}

func (s *Session) stopBeating() { s.stopOnce.Do(func() { close(s.stop) }) }

// Dead reports whether a generation of a slot is dead, so that what it owns is
// free.
func (s *Session) Dead(ctx context.Context, slot int, generation uint32) (bool, error) {
	if err := s.area.checkSlot(slot); err != nil {
		return false, err
	}
	r, err := s.area.readRegister(ctx, s.device, slot)
	if err != nil {
		return false, err
	}
	return r.reg.Dead(generation), nil
}

// maxCallTries bounds the changes that Call tries against others'.
const maxCallTries = 16

// Call tells the holder of a slot that somebody waits for something of its. It
// returns ErrDead when that generation is not live any more.
func (s *Session) Call(ctx context.Context, slot int, generation uint32) error {
	if err := s.area.checkSlot(slot); err != nil {
		return err
	}
	for range maxCallTries {
		cur, err := s.area.readRegister(ctx, s.device, slot)
		if err != nil {
			return err
		}
		r := cur.reg
		if r.Generation != generation || r.Phase != Live {
			return fmt.Errorf("call slot %d generation %d, which is at %d %v: %w", slot, generation, r.Generation, r.Phase, ErrDead)
		}
		r.Calls++
		_, err = s.area.swapRegister(ctx, s.device, slot, cur.img, r, s.opts.Nonce)
		if !isChanged(err) {
			return err
		}
	}
	return fmt.Errorf("call slot %d: %w", slot, block.ErrBusy)
}

// isChanged tells the outcomes of a swap after which one reads and judges anew.
func isChanged(err error) bool {
	return errors.Is(err, unit.ErrConflict) || errors.Is(err, unit.ErrNotExecuted)
}

// Close, which is called once, gives the slot back: it refuses new I/O, waits for the I/O in progress,
// turns the register FREE and closes the device. If ctx ends first the generation
// is abandoned instead: the register stays LIVE for others to break, and the
// device is closed once its I/O has ended. It returns ErrLost when the generation
// was lost before.
func (s *Session) Close(ctx context.Context) error {
	err := s.closeSlot(ctx)
	select {
	case <-s.ended:
	default:
		return err // abandoned: the device is closed once its I/O has ended
	}
	if cerr := s.raw.Close(); cerr != nil && !errors.Is(cerr, block.ErrClosed) {
		err = errors.Join(err, fmt.Errorf("lease: close device: %w", cerr))
	}
	return err
}

// closeSlot ends the generation and leaves the device open, unless the generation
// was lost.
func (s *Session) closeSlot(ctx context.Context) error {
	s.device.gate.close(fmt.Errorf("lease: session: %w", block.ErrClosed))
	drained := s.device.gate.drain(ctx)
	if drained != nil {
		s.abandon(drained)
		return drained
	}
	s.stopBeating()
	select {
	case <-s.ended:
	case <-ctx.Done():
		err := fmt.Errorf("lease: heartbeat has not ended: %w", ctx.Err())
		s.abandon(err)
		return err
	}
	if err := s.Err(); err != nil {
		return err
	}
	return s.release(ctx)
}

// release turns the register FREE. All I/O of the generation has ended.
func (s *Session) release(ctx context.Context) error {
	for range maxCallTries {
		cur, err := s.area.readRegister(ctx, s.raw, s.slot)
		if err != nil {
			return fmt.Errorf("lease: release slot %d: %w", s.slot, err)
		}
		r := cur.reg
		if r.Generation != s.generation || r.Claim != s.claim || r.Phase != Live {
			return fmt.Errorf("lease: release slot %d: it is at generation %d %v: %w", s.slot, r.Generation, r.Phase, ErrLost)
		}
		r.Phase = Free
		_, err = s.area.swapRegister(ctx, s.raw, s.slot, cur.img, r, s.opts.Nonce)
		if err == nil {
			return s.unguard(ctx)
		}
		if !isChanged(err) {
			return fmt.Errorf("lease: release slot %d: %w", s.slot, err)
		}
	}
	return fmt.Errorf("lease: release slot %d: %w", s.slot, block.ErrBusy)
}

func (s *Session) unguard(ctx context.Context) error {
	if err := s.fencer.Unguard(ctx, s.slot); err != nil {
		return fmt.Errorf("lease: unguard slot %d: %w", s.slot, err)
	}
	return nil
}
