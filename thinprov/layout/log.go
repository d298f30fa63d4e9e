package layout

import "fmt"

// RecordHead begins a log record. Records are whole blocks and never cross the end
// of a slab of the ring.
//
//	off  size  field
//	  0     4  CRC          of volume id, own address in bytes (u64), then bytes [4,Length)
//	  4     4  Magic        "BLOG"
//	  8     4  Length       bytes, a multiple of 4096, at most 131072
//	 12     4  Used         bytes of entries behind the head
//	 16     8  LockGen      lock generation of the writer
//	 24     8  Seq          one more than the record before
//	 32     4  Prev         CRC of the record before
//	 36     4  Slot         of the object
//	 40     2  Incarnation
//	 42    22  reserved
//	 64   ...  entries, zero behind them
type RecordHead struct {
	LockGen, Seq uint64
	Prev         uint32
	Length, Used int
}

// Record sizes.
const (
	RecordHeadBytes = 64
	MaxRecordBytes  = 128 << 10
	recordMagic     = 0x474f4c42 // "BLOG"
)

// SealRecord writes the head into b, whose length is the record's and whose entries
// are in place, and returns its CRC.
func (s Seed) SealRecord(b []byte, offBytes int64, h RecordHead) uint32 {
	clear(b[:RecordHeadBytes])
	le.PutUint32(b[4:], recordMagic)
	le.PutUint32(b[8:], uint32(len(b)))
	le.PutUint32(b[12:], uint32(h.Used))
	le.PutUint64(b[16:], h.LockGen)
	le.PutUint64(b[24:], h.Seq)
	le.PutUint32(b[32:], h.Prev)
	le.PutUint32(b[36:], s.Owner.Slot)
	le.PutUint16(b[40:], s.Owner.Incarnation)
	crc := s.sum(b, offBytes)
	le.PutUint32(b, crc)
	return crc
}

// RecordLength tells how long the record that begins with b claims to be; 0 if b
// does not begin a record.
func RecordLength(b []byte) int {
	if len(b) < RecordHeadBytes || le.Uint32(b[4:]) != recordMagic {
		return 0
	}
	n := le.Uint32(b[8:])
	if n == 0 || n > MaxRecordBytes || n%BlockBytes != 0 {
		return 0
	}
	return int(n)
}

// OpenRecord checks b as the record at offBytes and returns its head and CRC. What
// its sequence and Prev must be is the reader's to know.
func (s Seed) OpenRecord(b []byte, offBytes int64) (RecordHead, uint32, error) {
	bad := func(format string, args ...any) (RecordHead, uint32, error) {
		return RecordHead{}, 0, corrupt("log record", offBytes, format, args...)
	}
	if n := RecordLength(b); n == 0 || n != len(b) {
		return bad("%d bytes where %d were read", n, len(b))
	}
	crc := le.Uint32(b)
	if got := s.sum(b, offBytes); got != crc {
		return bad("checksum %08x, computed %08x", crc, got)
	}
	h := RecordHead{LockGen: le.Uint64(b[16:]), Seq: le.Uint64(b[24:]), Prev: le.Uint32(b[32:]), Length: len(b), Used: int(le.Uint32(b[12:]))}
	if owner := (Ref{Slot: le.Uint32(b[36:]), Incarnation: le.Uint16(b[40:])}); owner != s.Owner {
		return bad("belongs to object %d.%d", owner.Slot, owner.Incarnation)
	}
	if h.Used > len(b)-RecordHeadBytes {
		return bad("%d bytes of entries in %d", h.Used, len(b))
	}
	return h, crc, nil
}

// EntryKind tells what a log entry changes. The values are part of the format.
type EntryKind uint16

// The kinds of log entries. 64 and above are reserved for the volatile tail (R12)
// and for moves (R21).
const (
	EntryMap         EntryKind = 1  // Logical, Length, Physical: the head maps them, born now
	EntryUnmap       EntryKind = 2  // Logical, Length
	EntrySnapshot    EntryKind = 3  // Epoch, Parent, UUID, Created, Name: the head's epoch ends
	EntryDeleteBegin EntryKind = 4  // Epoch
	EntryDeleteStep  EntryKind = 5  // Epoch, From, To: recomputed over the trees at this point
	EntryDeleteEnd   EntryKind = 6  // Epoch
	EntryClaim       EntryKind = 7  // Slab, Units: a claim may change these units
	EntryClaimed     EntryKind = 8  // Slab, Slabs: it ended with these
	EntryRelease     EntryKind = 9  // Slabs leave the slab table and are being given back
	EntryReleased    EntryKind = 10 // they are given back
	EntryPublish     EntryKind = 11 // Epoch, Ref
	EntryUnpublish   EntryKind = 12 // Epoch
	EntryResize      EntryKind = 13 // SizeBytes
	EntryOpen        EntryKind = 14 // UUID is the opener's boot id
)

// Entry is one change of a disk. Which fields count depends on Kind.
//
//	off  size  field
//	  0     2  Kind
//	  2     2  Size   of the entry in bytes, a multiple of 8
//	  4     4  Arg
//
//	Kind            Arg           from byte 8
//	 1 map          Length        Logical u64, Physical u64
//	 2 unmap        0             Logical u64, Length u64
//	 3 snapshot     name length   Epoch u64, Parent u64, UUID 16, Created i64, Name padded to 8
//	 4 delete begin 0             Epoch u64
//	 5 delete step  0             Epoch u64, From u64, To u64
//	 6 delete end   0             Epoch u64
//	 7 claim        slab kind     Units u32 each, padded by ffffffff to 8
//	 8 claimed      slab kind     Slabs u64 each
//	 9 release      0             Slabs u64 each
//	10 released     0             -
//	11 publish      0             Epoch u64, Slot u32, Incarnation u16, zero u16
//	12 unpublish    0             Epoch u64
//	13 resize       0             SizeBytes u64
//	14 open         0             boot id 16
type Entry struct {
	Kind                      EntryKind
	Logical, Length, Physical uint64
	Epoch, Parent, From, To   uint64
	UUID                      [16]byte
	Created                   int64
	Name                      string
	Slab                      SlabKind
	Units                     []uint32
	Slabs                     []uint64
	Ref                       Ref
	SizeBytes                 int64
}

// noUnit pads a claim's list of units to a multiple of 8 bytes.
const noUnit = ^uint32(0)

// Append encodes e behind b.
func (e Entry) Append(b []byte) []byte {
	start := len(b)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0)
	arg := uint32(0)
	switch e.Kind {
	case EntryMap:
		arg = uint32(e.Length)
		b = le.AppendUint64(le.AppendUint64(b, e.Logical), e.Physical)
	case EntryUnmap:
		b = le.AppendUint64(le.AppendUint64(b, e.Logical), e.Length)
	case EntrySnapshot:
		arg = uint32(len(e.Name))
		b = le.AppendUint64(le.AppendUint64(b, e.Epoch), e.Parent)
		b = le.AppendUint64(append(b, e.UUID[:]...), uint64(e.Created))
		b = append(b, e.Name...)
		b = append(b, make([]byte, -len(e.Name)&7)...)
	case EntryDeleteStep:
		b = le.AppendUint64(le.AppendUint64(le.AppendUint64(b, e.Epoch), e.From), e.To)
	case EntryDeleteBegin, EntryDeleteEnd, EntryUnpublish:
		b = le.AppendUint64(b, e.Epoch)
	case EntryClaim:
		arg = uint32(e.Slab)
		for _, u := range e.Units {
			b = le.AppendUint32(b, u)
		}
		if len(e.Units)%2 == 1 {
			b = le.AppendUint32(b, noUnit)
		}
	case EntryClaimed, EntryRelease:
		arg = uint32(e.Slab)
		for _, s := range e.Slabs {
			b = le.AppendUint64(b, s)
		}
	case EntryPublish:
		b = le.AppendUint32(le.AppendUint64(b, e.Epoch), e.Ref.Slot)
		b = append(le.AppendUint16(b, e.Ref.Incarnation), 0, 0)
	case EntryResize:
		b = le.AppendUint64(b, uint64(e.SizeBytes))
	case EntryOpen:
		b = append(b, e.UUID[:]...)
	}
	le.PutUint16(b[start:], uint16(e.Kind))
	le.PutUint16(b[start+2:], uint16(len(b)-start))
	le.PutUint32(b[start+4:], arg)
	return b
}

// NextEntry decodes the entry at the start of b and returns what is behind it.
func NextEntry(b []byte) (Entry, []byte, error) {
	if len(b) < 8 {
		return Entry{}, nil, fmt.Errorf("%d bytes are too few for a log entry", len(b))
	}
	kind, size, arg := EntryKind(le.Uint16(b)), int(le.Uint16(b[2:])), le.Uint32(b[4:])
	if size < 8 || size%8 != 0 || size > len(b) {
		return Entry{}, nil, fmt.Errorf("log entry of %d bytes in %d", size, len(b))
	}
	e, err := decodeEntry(kind, arg, b[8:size])
	if err != nil {
		return Entry{}, nil, fmt.Errorf("log entry of kind %d: %w", kind, err)
	}
	return e, b[size:], nil
}

// bodyBytes is the length of an entry's body where the kind alone decides it, or -1.
func bodyBytes(k EntryKind) int {
	switch k {
	case EntryMap, EntryUnmap, EntryPublish, EntryOpen:
		return 16
	case EntryDeleteStep:
		return 24
	case EntryDeleteBegin, EntryDeleteEnd, EntryUnpublish, EntryResize:
		return 8
	case EntryReleased:
		return 0
	}
	return -1
}

func decodeEntry(kind EntryKind, arg uint32, b []byte) (Entry, error) {
	if want := bodyBytes(kind); want >= 0 && len(b) != want {
		return Entry{}, fmt.Errorf("%d bytes instead of %d", len(b), want)
	}
	e := Entry{Kind: kind}
	switch kind {
	case EntryMap:
		e.Logical, e.Physical, e.Length = le.Uint64(b), le.Uint64(b[8:]), uint64(arg)
		if !validRange(e.Logical, e.Length) || e.Length > MaxExtent || e.Physical < FirstBlock || e.Physical+e.Length-1 > MaxBlock {
			return Entry{}, fmt.Errorf("maps %d blocks at %d to %d", e.Length, e.Logical, e.Physical)
		}
		return e, nil
	case EntryUnmap:
		e.Logical, e.Length = le.Uint64(b), le.Uint64(b[8:])
		if !validRange(e.Logical, e.Length) {
			return Entry{}, fmt.Errorf("unmaps %d blocks at %d", e.Length, e.Logical)
		}
	case EntrySnapshot:
		return decodeSnapshotEntry(arg, b)
	case EntryDeleteStep:
		e.Epoch, e.From, e.To = le.Uint64(b), le.Uint64(b[8:]), le.Uint64(b[16:])
		if e.From > e.To || e.To > MaxKeys {
			return Entry{}, fmt.Errorf("range %d to %d", e.From, e.To)
		}
	case EntryDeleteBegin, EntryDeleteEnd, EntryUnpublish:
		e.Epoch = le.Uint64(b)
	case EntryPublish:
		e.Epoch, e.Ref = le.Uint64(b), Ref{Slot: le.Uint32(b[8:]), Incarnation: le.Uint16(b[12:])}
	case EntryResize:
		e.SizeBytes = int64(le.Uint64(b))
		if e.SizeBytes <= 0 || e.SizeBytes > MaxSizeBytes || e.SizeBytes%512 != 0 {
			return Entry{}, fmt.Errorf("size of %d bytes", e.SizeBytes)
		}
	case EntryOpen:
		copy(e.UUID[:], b)
	case EntryReleased:
	case EntryClaim, EntryClaimed, EntryRelease:
		return decodeSlabEntry(kind, arg, b)
	default:
		return Entry{}, fmt.Errorf("unknown kind")
	}
	if arg != 0 {
		return Entry{}, fmt.Errorf("argument %d", arg)
	}
	return e, nil
}

func decodeSnapshotEntry(arg uint32, b []byte) (Entry, error) {
	n := int(arg)
	if n == 0 || n > MaxName || len(b) != 40+(n+7)&^7 || !allZero(b[40+n:]) {
		return Entry{}, fmt.Errorf("name of %d bytes in %d", n, len(b))
	}
	e := Entry{Kind: EntrySnapshot, Epoch: le.Uint64(b), Parent: le.Uint64(b[8:]), Created: int64(le.Uint64(b[32:])), Name: string(b[40 : 40+n])}
	copy(e.UUID[:], b[16:])
	if e.Epoch == 0 || e.Parent >= e.Epoch || !CheckName(e.Name) {
		return Entry{}, fmt.Errorf("snapshot %q of epoch %d after %d", e.Name, e.Epoch, e.Parent)
	}
	return e, nil
}

func decodeSlabEntry(kind EntryKind, arg uint32, b []byte) (Entry, error) {
	e := Entry{Kind: kind}
	if arg > uint32(SlabLog) {
		return Entry{}, fmt.Errorf("slab kind %d", arg)
	}
	e.Slab = SlabKind(arg)
	if (kind == EntryRelease) != (e.Slab == 0) {
		return Entry{}, fmt.Errorf("slab kind %d", e.Slab)
	}
	if len(b)/4 > MaxClaimUnits && kind == EntryClaim || len(b)/8 > MaxReleasing {
		return Entry{}, fmt.Errorf("list of %d bytes", len(b))
	}
	if kind == EntryClaim {
		for ; len(b) > 0; b = b[4:] {
			if u := le.Uint32(b); u != noUnit {
				e.Units = append(e.Units, u)
			} else if len(b) != 4 {
				return Entry{}, fmt.Errorf("padding inside the list")
			}
		}
		return e, nil
	}
	for ; len(b) > 0; b = b[8:] {
		s := le.Uint64(b)
		if !validSlab(s) {
			return Entry{}, fmt.Errorf("slab %d", s)
		}
		e.Slabs = append(e.Slabs, s)
	}
	return e, nil
}

func validRange(first, n uint64) bool {
	return n > 0 && n <= MaxKeys && first <= MaxKeys-n
}
