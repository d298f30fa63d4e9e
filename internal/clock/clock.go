// Package clock is time as an argument. Leases count on Now, which is
// CLOCK_BOOTTIME: it never steps and counts suspend. Wall is for people.
package clock

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Instant is a point in time of one machine's boot, in nanoseconds since it.
// Instants of different machines are never compared.
type Instant int64

// Add returns the instant d later.
func (t Instant) Add(d time.Duration) Instant { return t + Instant(d) }

// Sub returns the time from u to t.
func (t Instant) Sub(u Instant) time.Duration { return time.Duration(t - u) }

// Clock tells the time and waits for it.
type Clock interface {
	Now() Instant
	// Wall is the time of day, for records that people read.
	Wall() time.Time
	// NewTimer fires once on C after d. Stop ends it early.
	NewTimer(d time.Duration) *Timer
}

// Timer is a one-shot timer of a Clock.
type Timer struct {
	C    <-chan struct{}
	stop func()
}

// Stop ends the timer; C may or may not have fired.
func (t *Timer) Stop() { t.stop() }

// System is the machine's clock.
type System struct{}

// Now reads CLOCK_BOOTTIME.
func (System) Now() Instant {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("clock: CLOCK_BOOTTIME: " + err.Error()) // every Linux since 2.6.39 has it
	}
	return Instant(ts.Nano())
}

// Wall reads the time of day.
func (System) Wall() time.Time { return time.Now() }

// NewTimer waits on the runtime's timer. It does not count suspend, so whoever
// wakes by it reads Now again.
func (System) NewTimer(d time.Duration) *Timer {
	c := make(chan struct{}, 1)
	t := time.AfterFunc(d, func() { c <- struct{}{} })
	return &Timer{C: c, stop: func() { t.Stop() }}
}

// Fake is a clock that moves only by Advance, for tests and simulation.
type Fake struct {
	mu     sync.Mutex // guards now, timers
	now    Instant
	timers []*fakeTimer
}

type fakeTimer struct {
	at Instant
	c  chan struct{}
}

// NewFake returns a clock that stands at one hour after boot.
func NewFake() *Fake { return &Fake{now: Instant(time.Hour)} }

// Now returns the fake's time.
func (f *Fake) Now() Instant {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now
}

// Wall is a fixed date plus Now.
func (f *Fake) Wall() time.Time {
	return time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).Add(time.Duration(f.Now()))
}

// NewTimer fires when Advance reaches d from now.
func (f *Fake) NewTimer(d time.Duration) *Timer {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := &fakeTimer{at: f.now.Add(d), c: make(chan struct{}, 1)}
	f.timers = append(f.timers, t)
	f.fireLocked()
	return &Timer{C: t.c, stop: func() { f.drop(t) }}
}

// Advance moves the clock by d and fires the timers that are due.
func (f *Fake) Advance(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now = f.now.Add(d)
	f.fireLocked()
}

func (f *Fake) fireLocked() {
	keep := f.timers[:0]
	for _, t := range f.timers {
		if t.at <= f.now {
			t.c <- struct{}{}
			continue
		}
		keep = append(keep, t)
	}
	f.timers = keep
}

func (f *Fake) drop(t *fakeTimer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, have := range f.timers {
		if have == t {
			f.timers = append(f.timers[:i], f.timers[i+1:]...)
			return
		}
	}
}
