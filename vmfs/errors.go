package vmfs

import (
	"errors"
	"fmt"
	"time"

	"basalt/block"
)

// Errors that callers decide on. Damage is a *block.CorruptError.
var (
	ErrNotVolume   = errors.New("vmfs: no volume on this device")
	ErrFormat      = errors.New("vmfs: volume of a newer format")
	ErrTooSmall    = errors.New("vmfs: device too small")
	ErrTruncated   = errors.New("vmfs: the device is shorter than its volume")
	ErrExists      = errors.New("vmfs: exists already")
	ErrNotFound    = errors.New("vmfs: not found")
	ErrName        = errors.New("vmfs: not a valid name")
	ErrNotEmpty    = errors.New("vmfs: folder is not empty")
	ErrNotFolder   = errors.New("vmfs: not a folder")
	ErrIsFolder    = errors.New("vmfs: is a folder")
	ErrKind        = errors.New("vmfs: object is of another kind")
	ErrFolderFull  = errors.New("vmfs: folder is full")
	ErrInUse       = errors.New("vmfs: others depend on it")
	ErrNoSpace     = errors.New("vmfs: volume is full")
	ErrHeld        = errors.New("vmfs: held by another host")
	ErrReadOnly    = errors.New("vmfs: volume is open for reading only")
	ErrLyingDevice = errors.New("vmfs: the device does not execute compare-and-write as it says")
	ErrNoObjects   = errors.New("vmfs: no free object slots")
)

// HeldError says who holds an object. It unwraps to ErrHeld.
type HeldError struct {
	Path       string // what is held, as far as it is known by name
	HostName   string
	Slot       int
	Generation uint32
	Age        time.Duration // since the lock was taken, by the holder's clock; 0 when unknown
	Cause      error         // why it was not taken over; nil: the holder is alive
}

func (e *HeldError) Error() string {
	s := fmt.Sprintf("%s is held by host %q (slot %d)", e.Path, e.HostName, e.Slot)
	if e.Age > 0 {
		s += fmt.Sprintf(" for %v", e.Age.Round(time.Second))
	}
	if e.Cause != nil {
		s += ": " + e.Cause.Error()
	}
	return s
}

// Unwrap gives ErrHeld and the cause.
func (e *HeldError) Unwrap() []error {
	if e.Cause == nil {
		return []error{ErrHeld}
	}
	return []error{ErrHeld, e.Cause}
}

// isDamage tells a record that cannot be trusted from a device that cannot be read.
func isDamage(err error) bool {
	_, ok := errors.AsType[*block.CorruptError](err)
	return ok
}
