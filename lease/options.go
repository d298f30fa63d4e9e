package lease

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"time"

	"basalt/block"
)

// Options says who claims and how fast a dead host is found out. The zero value
// works but for HostName.
type Options struct {
	HostName string        // 1 to 255 bytes; how other hosts call this one
	HostID   [16]byte      // of the machine, as /etc/machine-id
	Process  block.Process // who is killed when this holder must be fenced
	Address  string        // on the LAN, at most 64 bytes; may be empty
	Server   bool          // a long-running server: one of a name at a time

	Lease    time.Duration // one heartbeat lasts this long; default DefaultLease
	Period   time.Duration // between heartbeats, and between polls of others; default Lease/8
	IOBudget time.Duration // a heartbeat's I/O is given up after this; default Lease/2
	Drain    time.Duration // ConfirmDown waits this long for late writes; default 10 s

	// Nonce returns random numbers, to several goroutines at once; default
	// crypto/rand.
	Nonce func() uint64
	// Vouched names hosts that a person says are down. It is for devices without
	// compare-and-write among hosts, which cannot be claimed while another host has a
	// slot: those of the names are then broken by that word, see ConfirmDown.
	Vouched []string

	// OnBreak is called after each break that Watch has tried and each that Break has
	// brought to its end, from the goroutine that broke; may be nil.
	OnBreak func(BreakReport)
}

// Lengths of leases. A shorter lease finds a dead host sooner and takes a slow
// device for a dead host sooner.
const (
	DefaultLease = 8 * time.Second
	FastLease    = 3 * time.Second

	defaultDrain    = 10 * time.Second
	periodsPerLease = 8
	minPerLease     = 4 // fewer heartbeats in a lease leave no room for a lost one
)

func (o Options) withDefaults() Options {
	if o.Lease == 0 {
		o.Lease = DefaultLease
	}
	if o.Period == 0 {
		o.Period = o.Lease / periodsPerLease
	}
	if o.IOBudget == 0 {
		o.IOBudget = o.Lease / 2
	}
	if o.Drain == 0 {
		o.Drain = defaultDrain
	}
	if o.Nonce == nil {
		o.Nonce = randomNonce
	}
	return o
}

func (o Options) validate() error {
	switch {
	case o.HostName == "" || len(o.HostName) > MaxHostName:
		return fmt.Errorf("lease: host name of %d bytes, want 1 to %d", len(o.HostName), MaxHostName)
	case len(o.Address) > MaxAddress:
		return fmt.Errorf("lease: address of %d bytes, want at most %d", len(o.Address), MaxAddress)
	case o.Lease < MinLease || o.Lease > MaxLease || o.Lease%time.Millisecond != 0:
		return fmt.Errorf("lease: Lease %v, want whole milliseconds from %v to %v", o.Lease, MinLease, MaxLease)
	case o.Period <= 0 || o.Lease < minPerLease*o.Period:
		return fmt.Errorf("lease: Lease %v is shorter than %d periods of %v", o.Lease, minPerLease, o.Period)
	case o.IOBudget < o.Period || o.IOBudget > o.Lease:
		return fmt.Errorf("lease: IOBudget %v is not between Period %v and Lease %v", o.IOBudget, o.Period, o.Lease)
	case o.Drain < 0:
		return fmt.Errorf("lease: Drain %v is negative", o.Drain)
	}
	return nil
}

func randomNonce() uint64 {
	var b [8]byte
	rand.Read(b[:]) // never fails (crypto/rand since Go 1.24)
	return binary.LittleEndian.Uint64(b[:])
}
