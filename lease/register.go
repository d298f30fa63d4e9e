package lease

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"time"

	"basalt/block"
)

// Phase is where a slot's generation stands in its life.
//
//	FREE ──claim──▶ LIVE ──break──▶ KILL ──fenced──▶ DONE ──claim──▶ LIVE of the next generation
//	  ▲              │ ▲              │ │
//	  └───release────┘ └──withdraw────┘ └─▶ KILL by another breaker
type Phase uint8

// The phases. The values are part of the on-disk format.
const (
	Free Phase = 0 // released cleanly, or never claimed
	Live Phase = 1 // claimed
	Kill Phase = 2 // being broken; the holder must give up
	Done Phase = 3 // broken: its holder can write no more
)

func (p Phase) String() string {
	switch p {
	case Free:
		return "FREE"
	case Live:
		return "LIVE"
	case Kill:
		return "KILL"
	case Done:
		return "DONE"
	}
	return fmt.Sprintf("phase %d", uint8(p))
}

// Limits of the register's fields.
const (
	MaxHostName = 255 // bytes
	MaxAddress  = 64  // bytes
	MinLease    = 50 * time.Millisecond
	MaxLease    = 5 * time.Minute
)

// Register is the record that decides about a slot. In FREE and DONE it still
// tells who held the slot last.
type Register struct {
	Generation        uint32 // 0: never claimed
	Phase             Phase
	Server            bool // the claimer is a long-running server, not one command
	BreakerSlot       uint8
	BreakerGeneration uint32 // of the breaker in KILL and DONE; 0: it holds no slot
	Calls             uint32 // counts others' wishes; wraps
	HostID            [16]byte
	Process           block.Process
	Fencers           block.FenceKinds // methods the claimer is subject to
	Lease             time.Duration    // whole milliseconds, MinLease to MaxLease
	ClaimedAt         time.Time        // wall clock of the claimer, for people
	Claim             uint64           // random, of one claim: tells a claim from its likes
	Address           string           // where the claimer can be reached on the LAN, "" when unknown
	HostName          string           // 1 to 255 bytes
}

// Dead reports whether generation g of the register's slot is dead: a later one
// has been claimed, or its holder is broken or gone.
func (r Register) Dead(g uint32) bool {
	return g < r.Generation || g == r.Generation && (r.Phase == Done || r.Phase == Free)
}

// Offsets in the unit of a register, whose head takes the first 24 bytes
// (docs/format/lease.md §2).
//
//	off  size  field
//	 24     4  Generation
//	 28     1  Phase              0 FREE, 1 LIVE, 2 KILL, 3 DONE
//	 29     1  Flags              bit 0: server
//	 30     1  BreakerSlot
//	 31     1  HostNameBytes      length of HostName
//	 32     4  BreakerGeneration
//	 36     4  Calls
//	 40    16  HostID
//	 56    16  BootID
//	 72     4  PID
//	 76     4  Fencers            set of block.FenceKinds
//	 80     8  StartTicks
//	 88     8  PIDNamespace
//	 96     4  LeaseMillis
//	100     4  reserved           readers preserve it
//	104     8  ClaimedAt          Unix time in nanoseconds
//	112     8  Claim
//	120    64  Address            padded with zeros
//	184    73  reserved           readers preserve it
//	257   255  HostName           padded with zeros
const (
	offGeneration        = 24
	offPhase             = 28
	offFlags             = 29
	offBreakerSlot       = 30
	offHostNameBytes     = 31
	offBreakerGeneration = 32
	offCalls             = 36
	offHostID            = 40
	offBootID            = 56
	offPID               = 72
	offFencers           = 76
	offStartTicks        = 80
	offPIDNamespace      = 88
	offLeaseMillis       = 96
	offClaimedAt         = 104
	offClaim             = 112
	offAddress           = 120
	offHostName          = 257

	// RegisterBytes is what a register takes of its unit, head included.
	RegisterBytes = 512
)

var _ = [1]struct{}{}[offHostName+MaxHostName-RegisterBytes] // the fields fill the smallest unit

const flagServer = 1 << 0

// DecodeRegister reads a register from a whole unit whose head has been checked.
func DecodeRegister(b []byte) (Register, error) {
	if len(b) < RegisterBytes {
		return Register{}, fmt.Errorf("%d bytes are too few for a register", len(b))
	}
	le := binary.LittleEndian
	r := Register{
		Generation:        le.Uint32(b[offGeneration:]),
		Phase:             Phase(b[offPhase]),
		Server:            b[offFlags]&flagServer != 0,
		BreakerSlot:       b[offBreakerSlot],
		BreakerGeneration: le.Uint32(b[offBreakerGeneration:]),
		Calls:             le.Uint32(b[offCalls:]),
		HostID:            [16]byte(b[offHostID:]),
		Process: block.Process{
			BootID:     [16]byte(b[offBootID:]),
			PID:        le.Uint32(b[offPID:]),
			StartTicks: le.Uint64(b[offStartTicks:]),
			PIDNS:      le.Uint64(b[offPIDNamespace:]),
		},
		Fencers:   block.FenceKinds(le.Uint32(b[offFencers:])),
		Lease:     time.Duration(le.Uint32(b[offLeaseMillis:])) * time.Millisecond,
		ClaimedAt: getTime(b[offClaimedAt:]),
		Claim:     le.Uint64(b[offClaim:]),
	}
	n := int(b[offHostNameBytes])
	if !isZero(b[offHostName+n : offHostName+MaxHostName]) {
		return Register{}, fmt.Errorf("host name goes on after its %d bytes", n)
	}
	r.HostName = string(b[offHostName : offHostName+n])
	address, pad, _ := bytes.Cut(b[offAddress:offAddress+MaxAddress], []byte{0})
	if !isZero(pad) {
		return Register{}, fmt.Errorf("address goes on after its end")
	}
	r.Address = string(address)
	if err := r.check(); err != nil {
		return Register{}, err
	}
	return r, nil
}

// EncodeInto writes the register's fields into a whole unit, leaving the head and
// what is reserved as they are.
func (r Register) EncodeInto(b []byte) {
	if err := r.check(); err != nil {
		panic("lease: encoding a register that no reader would accept: " + err.Error())
	}
	le := binary.LittleEndian
	le.PutUint32(b[offGeneration:], r.Generation)
	b[offPhase] = byte(r.Phase)
	b[offFlags] &^= flagServer
	if r.Server {
		b[offFlags] |= flagServer
	}
	b[offBreakerSlot] = r.BreakerSlot
	b[offHostNameBytes] = byte(len(r.HostName))
	le.PutUint32(b[offBreakerGeneration:], r.BreakerGeneration)
	le.PutUint32(b[offCalls:], r.Calls)
	copy(b[offHostID:], r.HostID[:])
	copy(b[offBootID:], r.Process.BootID[:])
	le.PutUint32(b[offPID:], r.Process.PID)
	le.PutUint32(b[offFencers:], uint32(r.Fencers))
	le.PutUint64(b[offStartTicks:], r.Process.StartTicks)
	le.PutUint64(b[offPIDNamespace:], r.Process.PIDNS)
	le.PutUint32(b[offLeaseMillis:], uint32(r.Lease/time.Millisecond))
	putTime(b[offClaimedAt:], r.ClaimedAt)
	le.PutUint64(b[offClaim:], r.Claim)
	putPadded(b[offAddress:offAddress+MaxAddress], r.Address)
	putPadded(b[offHostName:offHostName+MaxHostName], r.HostName)
}

// check is the reader's rules on a register's ranges.
func (r Register) check() error {
	switch {
	case r.Phase > Done:
		return fmt.Errorf("unknown %v", r.Phase)
	case r.Generation == 0 && r.Phase != Free:
		return fmt.Errorf("%v without a generation", r.Phase)
	case (r.Phase == Free || r.Phase == Live) && (r.BreakerSlot != 0 || r.BreakerGeneration != 0):
		return fmt.Errorf("%v with a breaker", r.Phase)
	case len(r.HostName) > MaxHostName || len(r.Address) > MaxAddress:
		return fmt.Errorf("host name of %d bytes, address of %d", len(r.HostName), len(r.Address))
	case bytes.IndexByte([]byte(r.HostName), 0) >= 0:
		return fmt.Errorf("host name with a zero byte")
	case r.Generation == 0 && (r.Lease != 0 || r.HostName != ""):
		return fmt.Errorf("never claimed, and yet of host %q", r.HostName)
	case r.Generation != 0 && r.HostName == "":
		return fmt.Errorf("generation %d without a host name", r.Generation)
	case r.Generation != 0 && (r.Lease < MinLease || r.Lease > MaxLease):
		return fmt.Errorf("lease of %v", r.Lease)
	}
	return nil
}

func isZero(b []byte) bool {
	return len(bytes.TrimLeft(b, "\x00")) == 0
}

func putPadded(b []byte, s string) {
	n := copy(b, s)
	clear(b[n:])
}

// getTime and putTime store a wall time as Unix nanoseconds; 0 is no time.
func getTime(b []byte) time.Time {
	ns := int64(binary.LittleEndian.Uint64(b))
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns).UTC()
}

func putTime(b []byte, t time.Time) {
	var ns int64
	if !t.IsZero() {
		ns = t.UnixNano()
	}
	binary.LittleEndian.PutUint64(b, uint64(ns))
}
