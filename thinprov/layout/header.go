package layout

// HeaderFlags are states of the whole disk. The values are part of the format.
type HeaderFlags uint32

// Flags of a header.
const (
	HeaderClean     HeaderFlags = 1 << 0 // closed in order; the log holds nothing newer
	HeaderTailInUse HeaderFlags = 1 << 1 // reserved for rule R12
	HeaderMoving    HeaderFlags = 1 << 2 // reserved for rule R21
)

// Features of the format. A disk with an unknown incompatible feature is refused,
// one with an unknown read-only-compatible feature opens for reading only.
const (
	knownROCompat = uint64(0)
	knownIncompat = uint64(0)
)

// maxEpoch leaves room to count up without ever wrapping.
const maxEpoch = uint64(1) << 62

// Limits of the lists in a header.
const (
	MinLogSlabs   = 2
	MaxLogSlabs   = 16
	MaxClaimUnits = 16
	MaxReleasing  = 64
)

// Header is the payload of a disk's object header: the state as of one checkpoint.
//
//	 off  size  field
//	   0     4  CRC          of volume id, address 0 (u64), then bytes [4,4096)
//	   4     4  Magic        "BDSK"
//	   8     4  Version      1
//	  12     4  Length       4096
//	  16     8  Compat       feature bits: unknown ones may be ignored
//	  24     8  ROCompat     unknown ones allow reading only
//	  32     8  Incompat     unknown ones forbid use
//	  40    16  UUID         of the disk
//	  56     8  SizeBytes    logical size
//	  64     8  Epoch        of the head: what it maps now is born in it
//	  72     8  Parent       epoch of the head's parent snapshot, 0 if none
//	  80     8  Checkpoint   sequence of the checkpoint
//	  88     8  LockGen      lock generation of its writer
//	  96     4  Flags        1 clean, 2 tail in use, 4 moving
//	 100     4  Slot         of the object
//	 104     2  Incarnation
//	 106     2  OriginInc    incarnation of a clone's origin (the published snapshot)
//	 108     4  OriginSlot   slot of a clone's origin, 0 if none
//	 112     8  OriginEpoch  epoch at which the clone left its origin
//	 120     8  Created      Unix time in nanoseconds
//	 128    48  Map          pointer to the head's map
//	 176    48  Slabs        pointer to the slab table
//	 224    48  Snapshots    pointer to the snapshot table
//	 272     8  Mapped       blocks mapped by the head
//	 280     8  Own          of these, not foreign
//	 288    16  BootID       of the host that opened the disk last
//	 304     8  LogOff       where the next record begins, in bytes of the ring
//	 312     8  LogSeq       sequence of the next record
//	 320     4  LogPrev      CRC of the record before it
//	 324     4  LogSlabs     slabs in the ring, 2..16; fewer while the disk is being created
//	 328     8  reserved
//	 336   128  Ring         the ring's slab numbers
//	 464     4  ClaimKind    slab kind of an open claim, 0 if none
//	 468     4  ClaimUnits   owner-table units it may have changed, 0..16
//	 472    64  Units
//	 536     4  Releasing    slabs of an open release, 0..64
//	 540     4  reserved
//	 544   512  Release      their slab numbers
//	1056    32  MovingTo     volume id, slot, incarnation; reserved for rule R21
//	1088    64  QoS          reserved
//	1152   512  KeyWrap      reserved for encryption
//	1664  2432  reserved
type Header struct {
	UUID                               [16]byte
	SizeBytes                          int64
	Epoch, Parent, Checkpoint, LockGen uint64
	Flags                              HeaderFlags
	Self, Origin                       Ref
	OriginEpoch                        uint64
	Created                            int64
	Map, Slabs, Snapshots              Pointer
	Mapped, Own                        uint64
	BootID                             [16]byte
	LogOff, LogSeq                     uint64
	LogPrev                            uint32
	Ring                               []uint64
	ClaimKind                          SlabKind
	ClaimUnits                         []uint32
	Releasing                          []uint64
	ReadOnly                           bool // not stored: an unknown read-only-compatible feature is set
}

// HeaderBytes is the length of an encoded Header.
const (
	HeaderBytes = 4096
	headerMagic = 0x4b534442 // "BDSK"
)

// EncodeInto patches h into b, a payload as it was read or HeaderBytes of zeros, so
// that reserved bytes survive.
func (h Header) EncodeInto(volume [16]byte, b []byte) {
	le.PutUint32(b[4:], headerMagic)
	le.PutUint32(b[8:], Version)
	le.PutUint32(b[12:], HeaderBytes)
	copy(b[40:], h.UUID[:])
	le.PutUint64(b[56:], uint64(h.SizeBytes))
	le.PutUint64(b[64:], h.Epoch)
	le.PutUint64(b[72:], h.Parent)
	le.PutUint64(b[80:], h.Checkpoint)
	le.PutUint64(b[88:], h.LockGen)
	le.PutUint32(b[96:], uint32(h.Flags))
	le.PutUint32(b[100:], h.Self.Slot)
	le.PutUint16(b[104:], h.Self.Incarnation)
	le.PutUint16(b[106:], h.Origin.Incarnation)
	le.PutUint32(b[108:], h.Origin.Slot)
	le.PutUint64(b[112:], h.OriginEpoch)
	le.PutUint64(b[120:], uint64(h.Created))
	for i, p := range []Pointer{h.Map, h.Slabs, h.Snapshots} {
		p.Put(b[128+PointerBytes*i:])
	}
	le.PutUint64(b[272:], h.Mapped)
	le.PutUint64(b[280:], h.Own)
	copy(b[288:], h.BootID[:])
	le.PutUint64(b[304:], h.LogOff)
	le.PutUint64(b[312:], h.LogSeq)
	le.PutUint32(b[320:], h.LogPrev)
	le.PutUint32(b[324:], uint32(len(h.Ring)))
	clear(b[336:464])
	for i, s := range h.Ring {
		le.PutUint64(b[336+8*i:], s)
	}
	clear(b[464:536])
	le.PutUint32(b[464:], uint32(h.ClaimKind))
	le.PutUint32(b[468:], uint32(len(h.ClaimUnits)))
	for i, u := range h.ClaimUnits {
		le.PutUint32(b[472+4*i:], u)
	}
	le.PutUint32(b[536:], uint32(len(h.Releasing)))
	clear(b[544:1056])
	for i, s := range h.Releasing {
		le.PutUint64(b[544+8*i:], s)
	}
	le.PutUint32(b, Seed{Volume: volume}.sum(b[:HeaderBytes], 0))
}

// DecodeHeader decodes the payload of a disk of the volume.
func DecodeHeader(volume [16]byte, b []byte) (Header, error) {
	bad := func(format string, args ...any) (Header, error) {
		return Header{}, corrupt("disk header", 0, format, args...)
	}
	if len(b) != HeaderBytes {
		return bad("%d bytes", len(b))
	}
	if err := checkPayload(volume, b, "disk header", headerMagic, HeaderBytes); err != nil {
		return Header{}, err
	}
	h := Header{
		SizeBytes: int64(le.Uint64(b[56:])), Epoch: le.Uint64(b[64:]), Parent: le.Uint64(b[72:]),
		Checkpoint: le.Uint64(b[80:]), LockGen: le.Uint64(b[88:]), Flags: HeaderFlags(le.Uint32(b[96:])),
		Self:        Ref{Slot: le.Uint32(b[100:]), Incarnation: le.Uint16(b[104:])},
		Origin:      Ref{Slot: le.Uint32(b[108:]), Incarnation: le.Uint16(b[106:])},
		OriginEpoch: le.Uint64(b[112:]), Created: int64(le.Uint64(b[120:])),
		Mapped: le.Uint64(b[272:]), Own: le.Uint64(b[280:]),
		LogOff: le.Uint64(b[304:]), LogSeq: le.Uint64(b[312:]), LogPrev: le.Uint32(b[320:]),
		ClaimKind: SlabKind(le.Uint32(b[464:])),
		ReadOnly:  le.Uint64(b[24:])&^knownROCompat != 0,
	}
	copy(h.UUID[:], b[40:])
	copy(h.BootID[:], b[288:])
	for i, p := range []*Pointer{&h.Map, &h.Slabs, &h.Snapshots} {
		var err error
		if *p, err = GetPointer(b[128+PointerBytes*i:]); err != nil {
			return bad("%v", err)
		}
	}
	ring, units, releasing := le.Uint32(b[324:]), le.Uint32(b[468:]), le.Uint32(b[536:])
	if ring > MaxLogSlabs || units > MaxClaimUnits || releasing > MaxReleasing {
		return bad("%d log slabs, %d claim units, %d releases", ring, units, releasing)
	}
	for i := range ring {
		h.Ring = append(h.Ring, le.Uint64(b[336+8*i:]))
	}
	for i := range units {
		h.ClaimUnits = append(h.ClaimUnits, le.Uint32(b[472+4*i:]))
	}
	for i := range releasing {
		h.Releasing = append(h.Releasing, le.Uint64(b[544+8*i:]))
	}
	return h, h.validate()
}

func (h Header) validate() error {
	bad := func(format string, args ...any) error {
		return corrupt("disk header", 0, format, args...)
	}
	switch {
	case h.SizeBytes <= 0 || h.SizeBytes > MaxSizeBytes || h.SizeBytes%512 != 0:
		return bad("size of %d bytes", h.SizeBytes)
	case h.Epoch == 0 || h.Epoch > maxEpoch || h.Parent >= h.Epoch:
		return bad("epoch %d after %d", h.Epoch, h.Parent)
	case h.Mapped > MaxKeys || h.Own > h.Mapped:
		return bad("%d blocks mapped, %d own", h.Mapped, h.Own)
	case h.ClaimKind != 0 && !h.ClaimKind.valid(), (h.ClaimKind == 0) != (len(h.ClaimUnits) == 0):
		return bad("claim of kind %d in %d units", h.ClaimKind, len(h.ClaimUnits))
	case h.LogOff%BlockBytes != 0, h.LogOff >= uint64(max(len(h.Ring), 1))*SlabBytes:
		return bad("log position %d in %d slabs", h.LogOff, len(h.Ring))
	}
	seen := make(map[uint64]bool, MaxLogSlabs+MaxReleasing)
	for _, s := range append(append([]uint64{}, h.Ring...), h.Releasing...) {
		if !validSlab(s) || seen[s] {
			return bad("slab %d is out of range or listed twice", s)
		}
		seen[s] = true
	}
	return nil
}

// checkPayload checks what headers and published snapshots have in common.
func checkPayload(volume [16]byte, b []byte, object string, magic uint32, length int) error {
	switch crc := le.Uint32(b); {
	case crc != Seed{Volume: volume}.sum(b, 0):
		return corrupt(object, 0, "checksum %08x does not match", crc)
	case le.Uint32(b[4:]) != magic:
		return corrupt(object, 0, "magic %08x", le.Uint32(b[4:]))
	case le.Uint32(b[8:]) != Version || le.Uint32(b[12:]) != uint32(length):
		return corrupt(object, 0, "format version %d of %d bytes", le.Uint32(b[8:]), le.Uint32(b[12:]))
	case le.Uint64(b[32:])&^knownIncompat != 0:
		return corrupt(object, 0, "unknown incompatible features %#x", le.Uint64(b[32:]))
	}
	return nil
}
