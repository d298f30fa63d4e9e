package simdev

import (
	"context"
	"fmt"

	"basalt/block"
)

// key is what Guard registers, as a persistent reservation key is.
type key struct {
	slot       int
	generation uint32
}

// Kinds is FencePR.
func (h *Handle) Kinds() block.FenceKinds { return block.FencePR }

func (h *Handle) fencedError() error {
	return fmt.Errorf("simdev: host %s: %w", h.name, block.ErrFenced)
}

// inService runs do at the LUN for a host that is neither stopped nor fenced.
func (h *Handle) inService(ctx context.Context, do func() error) error {
	l := h.lun
	l.mu.Lock()
	defer l.mu.Unlock()
	h.calls++
	defer func() {
		h.calls--
		l.wakeLocked()
	}()
	if err := h.enterLocked(ctx); err != nil {
		return err
	}
	if h.fenced {
		return h.fencedError()
	}
	return do()
}

// Guard registers the key (slot, generation) for this handle, which has one key
// at a time. ErrBusy: a key of the slot is registered. Like a target, it knows
// nothing of the registers: a claimer that wakes after its own fence, on a new
// handle, is let in.
func (h *Handle) Guard(ctx context.Context, slot int, generation uint32) error {
	return h.inService(ctx, func() error {
		if h.key != nil {
			return fmt.Errorf("simdev: host %s: %w: this handle guards slot %d generation %d", h.name, block.ErrBusy, h.key.slot, h.key.generation)
		}
		for _, o := range h.lun.handles {
			if o.key != nil && o.key.slot == slot {
				return fmt.Errorf("simdev: host %s: %w: host %s guards slot %d generation %d", h.name, block.ErrBusy, o.name, slot, o.key.generation)
			}
		}
		h.key = &key{slot: slot, generation: generation}
		return nil
	})
}

// Unguard withdraws the key.
func (h *Handle) Unguard(ctx context.Context, slot int) error {
	return h.inService(ctx, func() error {
		if h.key == nil || h.key.slot != slot {
			return fmt.Errorf("simdev: host %s does not guard slot %d", h.name, slot)
		}
		h.key = nil
		return nil
	})
}

// Gone is true when the holder was killed and nothing of it is in flight.
func (h *Handle) Gone(ctx context.Context, holder block.Holder) (gone bool, err error) {
	err = h.inService(ctx, func() error {
		for _, o := range h.lun.registeredLocked(holder) {
			if o.state != dead || o.inFlightLocked() {
				gone = false
				return nil
			}
			gone = true
		}
		return nil
	})
	return gone, err
}

// Fence removes the holder's key, aborts what it has in flight, and refuses all
// later changes of the handle that had the key with ErrFenced, as PREEMPT AND
// ABORT does. A key that is not registered has nothing left to lose.
func (h *Handle) Fence(ctx context.Context, holder block.Holder) error {
	return h.inService(ctx, func() error {
		if h.Kinds()&holder.Fencers == 0 {
			return fmt.Errorf("simdev: fence slot %d: holder advertises %v: %w", holder.Slot, holder.Fencers, block.ErrNotSupported)
		}
		for _, o := range h.lun.registeredLocked(holder) {
			if o == h {
				return fmt.Errorf("simdev: host %s: fence slot %d: %w: this handle is the holder", h.name, holder.Slot, block.ErrBusy)
			}
			o.key = nil
			o.fenced = true
			o.abortHeldLocked(o.fencedError())
		}
		return nil
	})
}

func (h *Handle) inFlightLocked() bool { return h.hold != nil && len(h.hold.queue) > 0 }

// registeredLocked are the handles with the holder's key, in order of opening.
func (l *LUN) registeredLocked(holder block.Holder) []*Handle {
	var found []*Handle
	for _, h := range l.handles {
		if h.key != nil && *h.key == (key{slot: holder.Slot, generation: holder.Generation}) {
			found = append(found, h)
		}
	}
	return found
}
