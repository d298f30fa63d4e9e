package layout

import "fmt"

// SnapshotFlags are the states of a snapshot. The values are part of the format.
type SnapshotFlags uint32

// Flags of a snapshot.
const (
	SnapshotHidden    SnapshotFlags = 1 << 0 // a deleted branch point; see rule R16
	SnapshotDeleting  SnapshotFlags = 1 << 1 // blocks below Cursor are freed already
	SnapshotPublished SnapshotFlags = 1 << 2 // the object Published shows it to others

	snapshotFlags = SnapshotHidden | SnapshotDeleting | SnapshotPublished
)

// Snapshot is an entry of the snapshot table.
//
//	off  size  field
//	  0     8  Epoch        the last epoch whose changes it contains; its key
//	  8     8  Parent       epoch of the snapshot before it, 0 if none
//	 16    16  UUID
//	 32     8  Created      Unix time in nanoseconds
//	 40     4  Flags        1 hidden, 2 deleting, 4 published
//	 44     4  Slot         of the published object, 0 if none
//	 48     2  Incarnation
//	 50     2  NameLen      1..255
//	 52     4  reserved
//	 56    48  Root         pointer to the root of its map; zeros if nothing is mapped
//	104     8  Cursor       logical block; with Deleting, everything before it is done
//	112     8  Mapped       blocks
//	120     8  SizeBytes    of the disk at that moment
//	128   255  Name         zero behind NameLen
//	383    65  reserved
type Snapshot struct {
	Epoch, Parent  uint64
	UUID           [16]byte
	Created        int64
	Flags          SnapshotFlags
	Published      Ref
	Root           Pointer
	Cursor, Mapped uint64
	SizeBytes      int64
	Name           string
}

// SnapshotBytes is the length of an encoded Snapshot.
const SnapshotBytes = 448

// Put encodes s into b.
func (s Snapshot) Put(b []byte) {
	clear(b[:SnapshotBytes])
	le.PutUint64(b[0:], s.Epoch)
	le.PutUint64(b[8:], s.Parent)
	copy(b[16:], s.UUID[:])
	le.PutUint64(b[32:], uint64(s.Created))
	le.PutUint32(b[40:], uint32(s.Flags))
	le.PutUint32(b[44:], s.Published.Slot)
	le.PutUint16(b[48:], s.Published.Incarnation)
	le.PutUint16(b[50:], uint16(len(s.Name)))
	if !s.Root.IsNil() {
		s.Root.Put(b[56:])
	}
	le.PutUint64(b[104:], s.Cursor)
	le.PutUint64(b[112:], s.Mapped)
	le.PutUint64(b[120:], uint64(s.SizeBytes))
	copy(b[128:], s.Name)
}

// GetSnapshot decodes a snapshot table entry.
func GetSnapshot(b []byte) (Snapshot, error) {
	n := int(le.Uint16(b[50:]))
	if n == 0 || n > MaxName {
		return Snapshot{}, fmt.Errorf("snapshot name of %d bytes", n)
	}
	s := Snapshot{
		Epoch: le.Uint64(b[0:]), Parent: le.Uint64(b[8:]), Created: int64(le.Uint64(b[32:])),
		Flags:     SnapshotFlags(le.Uint32(b[40:])),
		Published: Ref{Slot: le.Uint32(b[44:]), Incarnation: le.Uint16(b[48:])},
		Cursor:    le.Uint64(b[104:]), Mapped: le.Uint64(b[112:]), SizeBytes: int64(le.Uint64(b[120:])),
		Name: string(b[128 : 128+n]),
	}
	copy(s.UUID[:], b[16:])
	var err error
	if s.Root, err = GetPointer(b[56:]); err != nil {
		return Snapshot{}, err
	}
	switch {
	case s.Epoch == 0 || s.Parent >= s.Epoch:
		return Snapshot{}, fmt.Errorf("snapshot of epoch %d after %d", s.Epoch, s.Parent)
	case s.Flags&^snapshotFlags != 0:
		return Snapshot{}, fmt.Errorf("unknown snapshot flags %#x", s.Flags)
	case s.SizeBytes <= 0 || s.SizeBytes > MaxSizeBytes || s.Cursor > MaxKeys || s.Mapped > MaxKeys:
		return Snapshot{}, fmt.Errorf("snapshot of %d bytes, %d blocks mapped, cursor %d", s.SizeBytes, s.Mapped, s.Cursor)
	case !CheckName(s.Name):
		return Snapshot{}, fmt.Errorf("snapshot name %q", s.Name)
	}
	return s, nil
}

// CheckName reports whether s can name a snapshot: 1 to 255 bytes, none of which is
// '@', ':', '/' or a control character.
func CheckName(s string) bool {
	if len(s) == 0 || len(s) > MaxName {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c < ' ' || c == 0x7f || c == '@' || c == ':' || c == '/' {
			return false
		}
	}
	return true
}

// Published is the header payload of a published snapshot's object.
//
//	off  size  field
//	  0     4  CRC         of volume id, address 0 (u64), then bytes [4,512)
//	  4     4  Magic       "BPUB"
//	  8     4  Version     1
//	 12     4  Length      512
//	 16     8  Compat      feature bits: unknown ones may be ignored
//	 24     8  ROCompat    unknown ones allow reading only
//	 32     8  Incompat    unknown ones forbid use
//	 40    16  UUID        of the snapshot
//	 56     8  SizeBytes
//	 64     8  Epoch       of the snapshot
//	 72    16  DiskUUID    of the origin
//	 88     4  Slot        of the origin
//	 92     2  Incarnation of the origin
//	 94     2  reserved
//	 96    48  Root        pointer, zeros if nothing is mapped
//	144     8  Mapped      blocks
//	152     8  Created     Unix time in nanoseconds
//	160     4  Slot        of the published object itself
//	164     2  Incarnation of the published object itself
//	166   346  reserved
type Published struct {
	UUID, DiskUUID [16]byte
	SizeBytes      int64
	Epoch          uint64
	Origin, Self   Ref
	Root           Pointer
	Mapped         uint64
	Created        int64
}

// PublishedBytes is the length of an encoded Published.
const (
	PublishedBytes = 512
	publishedMagic = 0x42555042 // "BPUB"
)

// Encode returns the payload for an object of the volume.
func (p Published) Encode(volume [16]byte) []byte {
	b := make([]byte, PublishedBytes)
	le.PutUint32(b[4:], publishedMagic)
	le.PutUint32(b[8:], Version)
	le.PutUint32(b[12:], PublishedBytes)
	copy(b[40:], p.UUID[:])
	le.PutUint64(b[56:], uint64(p.SizeBytes))
	le.PutUint64(b[64:], p.Epoch)
	copy(b[72:], p.DiskUUID[:])
	le.PutUint32(b[88:], p.Origin.Slot)
	le.PutUint16(b[92:], p.Origin.Incarnation)
	if !p.Root.IsNil() {
		p.Root.Put(b[96:])
	}
	le.PutUint64(b[144:], p.Mapped)
	le.PutUint64(b[152:], uint64(p.Created))
	le.PutUint32(b[160:], p.Self.Slot)
	le.PutUint16(b[164:], p.Self.Incarnation)
	le.PutUint32(b, Seed{Volume: volume}.sum(b, 0))
	return b
}

// DecodePublished decodes the payload of a published snapshot of the volume.
func DecodePublished(volume [16]byte, b []byte) (Published, error) {
	bad := func(format string, args ...any) (Published, error) {
		return Published{}, corrupt("published snapshot", 0, format, args...)
	}
	if len(b) != PublishedBytes {
		return bad("%d bytes", len(b))
	}
	if err := checkPayload(volume, b, "published snapshot", publishedMagic, PublishedBytes); err != nil {
		return Published{}, err
	}
	p := Published{
		SizeBytes: int64(le.Uint64(b[56:])), Epoch: le.Uint64(b[64:]),
		Origin: Ref{Slot: le.Uint32(b[88:]), Incarnation: le.Uint16(b[92:])},
		Mapped: le.Uint64(b[144:]), Created: int64(le.Uint64(b[152:])),
		Self: Ref{Slot: le.Uint32(b[160:]), Incarnation: le.Uint16(b[164:])},
	}
	copy(p.UUID[:], b[40:])
	copy(p.DiskUUID[:], b[72:])
	var err error
	if p.Root, err = GetPointer(b[96:]); err != nil {
		return bad("%v", err)
	}
	if p.SizeBytes <= 0 || p.SizeBytes > MaxSizeBytes || p.Epoch == 0 || p.Epoch > maxEpoch || p.Mapped > MaxKeys {
		return bad("%d bytes, epoch %d, %d blocks mapped", p.SizeBytes, p.Epoch, p.Mapped)
	}
	return p, nil
}
