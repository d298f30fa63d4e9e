package block

import (
	"context"
	"strings"
)

// FenceKinds is a set of fencing methods.
type FenceKinds uint32

// The fencing methods, best first. The values are part of the on-disk format
// (registers advertise them).
const (
	FencePR       FenceKinds = 1 << 0 // SCSI-3 persistent reservation, PREEMPT AND ABORT
	FenceOFD      FenceKinds = 1 << 1 // the slot's OFD lock on a file of one kernel
	FenceAgent    FenceKinds = 1 << 2 // an external fence agent switches the host off
	FenceWatchdog FenceKinds = 1 << 3 // the host resets itself
	FencePerson   FenceKinds = 1 << 4 // a person vouches that the host is down
	// FenceExclusive: the device is opened exclusively, by one process of one kernel
	// at a time, so that whoever has it open is the only one of its machine.
	FenceExclusive FenceKinds = 1 << 5
)

// String lists the methods, as in "pr,ofd"; "none" for the empty set.
func (k FenceKinds) String() string {
	names := []string{"pr", "ofd", "agent", "watchdog", "person", "exclusive"}
	var have []string
	for i, n := range names {
		if k&(1<<i) != 0 {
			have = append(have, n)
		}
	}
	if len(have) == 0 {
		return "none"
	}
	return strings.Join(have, ",")
}

// Process names one process of one boot of one machine, so that nobody else is
// ever killed in its place.
type Process struct {
	BootID     [16]byte // /proc/sys/kernel/random/boot_id
	PID        uint32   // in the pid namespace PIDNamespace
	StartTicks uint64   // field 22 of /proc/PID/stat, clock ticks after boot
	PIDNS      uint64   // inode number of /proc/PID/ns/pid
}

// Holder is a generation of a slot, as a fencer needs to know it: whose it is and
// what its register advertises.
type Holder struct {
	Slot       int
	Generation uint32
	HostID     [16]byte // of the machine, as its register says
	Process    Process
	Fencers    FenceKinds // methods its claimer supports
}

// Fencer cuts a holder off from the device: once Fence has returned nil, no write
// of that generation takes effect any more, not even one that was submitted long
// before. A lease alone cannot promise this.
type Fencer interface {
	// Kinds are the methods that this Fencer can use, both ways: they go into the
	// register of whoever claims a slot through it.
	Kinds() FenceKinds

	// Guard makes the caller's use of the slot subject to fencing; it is called
	// before the slot's register turns LIVE. ErrBusy: an earlier holder of the
	// slot may still write.
	Guard(ctx context.Context, slot int, generation uint32) error

	// Unguard ends Guard, after the last write of the generation has ended.
	Unguard(ctx context.Context, slot int) error

	// Gone reports whether the holder is already proven unable to write. It
	// changes nothing. It is false when that cannot be told.
	Gone(ctx context.Context, h Holder) (bool, error)

	// Fence cuts the holder off by a method that the holder advertises, verifies
	// it, and only then returns nil. ErrNotSupported: none of the methods applies
	// to this holder. ErrBusy: the method was tried, and the holder may still
	// write.
	Fence(ctx context.Context, h Holder) error
}
