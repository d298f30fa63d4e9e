package simdev

import (
	"bytes"
	"context"
	"fmt"
	"slices"
)

// Hold keeps the changes that a host submits in flight, between the host and the
// LUN, until they are let land. It stands for a write that was sent before its
// host froze, died or lost its lease, and arrives late. A call whose command is
// held waits for it to land; if its context ends first, or the host is killed, the
// call returns and the command stays in flight.
type Hold struct {
	host  *Handle
	queue []*command // in order of submission; guarded by LUN.mu
}

// HoldWrites begins to hold the host's changes. A second call gives the same Hold.
func (h *Handle) HoldWrites() *Hold {
	h.lun.mu.Lock()
	defer h.lun.mu.Unlock()
	if h.hold == nil {
		h.hold = &Hold{host: h}
	}
	return h.hold
}

// keepLocked takes the command in flight and waits for its end.
func (k *Hold) keepLocked(ctx context.Context, c *command) error {
	if k.host.fenced {
		return k.host.fencedError()
	}
	c.held = true
	c.data, c.compare = bytes.Clone(c.data), bytes.Clone(c.compare)
	k.queue = append(k.queue, c)
	k.host.lun.wakeLocked() // Await
	for !c.ended {
		if k.host.state == dead {
			return k.host.usableLocked()
		}
		if err := k.host.lun.waitLocked(ctx); err != nil {
			return err
		}
	}
	return c.err
}

// Pending is how many commands are in flight.
func (k *Hold) Pending() int {
	k.host.lun.mu.Lock()
	defer k.host.lun.mu.Unlock()
	return len(k.queue)
}

// Await waits until at least n commands are in flight.
func (k *Hold) Await(ctx context.Context, n int) error {
	l := k.host.lun
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(k.queue) < n {
		if err := l.waitLocked(ctx); err != nil {
			return fmt.Errorf("simdev: host %s: %d of %d commands in flight: %w", k.host.name, len(k.queue), n, err)
		}
	}
	return nil
}

// Land lets the i-th command in flight, counted from 0 in order of submission,
// reach the LUN now, and returns its outcome. There being none is an error too.
func (k *Hold) Land(i int) error {
	l := k.host.lun
	l.mu.Lock()
	if i < 0 || i >= len(k.queue) {
		defer l.mu.Unlock()
		return fmt.Errorf("simdev: host %s: command %d of %d in flight", k.host.name, i, len(k.queue))
	}
	c := k.queue[i]
	k.queue = slices.Delete(k.queue, i, i+1)
	l.executeLocked(k.host, c)
	l.wakeLocked()
	l.mu.Unlock()
	l.tell(c)
	return c.err
}

// Release ends the Hold and lets all that is in flight land in order of
// submission.
func (k *Hold) Release() {
	l := k.host.lun
	l.mu.Lock()
	landed := k.queue
	k.queue = nil
	if k.host.hold == k {
		k.host.hold = nil
	}
	for _, c := range landed {
		l.executeLocked(k.host, c)
	}
	l.wakeLocked()
	l.mu.Unlock()
	for _, c := range landed {
		l.tell(c)
	}
}

// abortHeldLocked ends all commands in flight without effect.
func (h *Handle) abortHeldLocked(err error) {
	if h.hold == nil {
		return
	}
	for _, c := range h.hold.queue {
		c.ended, c.err = true, err
	}
	h.hold.queue = nil
}
