package lease

import (
	"errors"
	"fmt"
	"time"

	"basalt/block"
)

// Errors that callers decide on.
var (
	// ErrLost: the session's generation is gone for good; nothing is submitted any
	// more.
	ErrLost = errors.New("lease: generation lost")
	// ErrAlive: the holder to break has shown a sign of life.
	ErrAlive = errors.New("lease: holder is alive")
	// ErrUnfenced: the holder is silent, and no fencing method has cut it off.
	ErrUnfenced = errors.New("lease: holder is silent and not fenced")
	// ErrDead: the generation asked for is dead already.
	ErrDead = errors.New("lease: generation is dead")
	// ErrNameInUse: a server of the same host name is alive.
	ErrNameInUse = errors.New("lease: a server of this host name is alive")
	// ErrNoSlot: every slot is taken by a holder that is not proven dead.
	ErrNoSlot = errors.New("lease: no free slot")
	// ErrNotShared: the device cannot exclude hosts from each other, and another
	// host has a slot.
	ErrNotShared = errors.New("lease: device has no compare-and-write among hosts and another host uses it")
)

// HolderError is a failed attempt to break a holder. It unwraps to ErrAlive or
// ErrUnfenced and, if there is one, to the fencer's error.
type HolderError struct {
	Err        error // ErrAlive or ErrUnfenced
	Slot       int
	Generation uint32
	HostName   string
	ClaimedAt  time.Time        // by the holder's wall clock
	Silence    time.Duration    // how long it was seen to be silent
	Offers     block.FenceKinds // fencing methods that the holder advertises
	Cause      error            // of the fencer; may be nil
}

func (e *HolderError) Error() string {
	who := fmt.Sprintf("host %q (slot %d, generation %d, since %s)", e.HostName, e.Slot, e.Generation, e.ClaimedAt.Format(time.RFC3339))
	if e.Err == ErrAlive {
		return fmt.Sprintf("%v: %s", e.Err, who)
	}
	s := fmt.Sprintf("%v: %s, silent for %v, offers %v", e.Err, who, e.Silence.Round(time.Millisecond), e.Offers)
	if e.Cause != nil {
		s += ": " + e.Cause.Error()
	}
	return s + ": make sure that it is down and confirm it (basalt fs confirm-down)"
}

func (e *HolderError) Unwrap() []error {
	if e.Cause == nil {
		return []error{e.Err}
	}
	return []error{e.Err, e.Cause}
}
