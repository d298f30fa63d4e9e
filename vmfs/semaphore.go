package vmfs

import (
	"context"
	"sync"
	"time"

	"basalt/internal/clock"
)

// semaphores excludes the goroutines of one mount from each other, by object slot.
// It remembers only the slots that somebody has or waits for.
type semaphores struct {
	mu sync.Mutex // guards m and the users of its semaphores
	m  map[uint32]*semaphore
}

type semaphore struct {
	token chan struct{} // holds one while it is taken
	users int           // who has it or waits for it
}

func (s *semaphores) use(slot uint32) *semaphore {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.m == nil {
		s.m = map[uint32]*semaphore{}
	}
	e := s.m[slot]
	if e == nil {
		e = &semaphore{token: make(chan struct{}, 1)}
		s.m[slot] = e
	}
	e.users++
	return e
}

func (s *semaphores) unuse(slot uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.m[slot].users--; s.m[slot].users == 0 {
		delete(s.m, slot)
	}
}

// enter takes a slot's semaphore and reports whether it did within the wait.
func (s *semaphores) enter(ctx context.Context, clk clock.Clock, slot uint32, wait Patience) (bool, error) {
	e := s.use(slot)
	select {
	case e.token <- struct{}{}:
		return true, nil
	default:
	}
	if wait == NoWait {
		s.unuse(slot)
		return false, nil
	}
	t := clk.NewTimer(time.Duration(wait))
	defer t.Stop()
	select {
	case e.token <- struct{}{}:
		return true, nil
	case <-t.C:
		s.unuse(slot)
		return false, nil
	case <-ctx.Done():
		s.unuse(slot)
		return false, ctx.Err()
	}
}

// leave gives a semaphore back that enter took.
func (s *semaphores) leave(slot uint32) {
	s.mu.Lock()
	e := s.m[slot]
	s.mu.Unlock()
	<-e.token
	s.unuse(slot)
}
