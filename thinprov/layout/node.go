package layout

import "fmt"

// TreeKind tells which tree a node belongs to. The values are part of the format.
type TreeKind uint8

// The trees of a disk.
const (
	TreeMap       TreeKind = 1 // extents
	TreeSlabs     TreeKind = 2 // slab table
	TreeSnapshots TreeKind = 3 // snapshot table
)

// NodeHead begins a tree node, which is one block.
//
//	off  size  field
//	  0     4  CRC          of volume id, own address in bytes (u64), then bytes [4,4096)
//	  4     4  Magic        "BTND"
//	  8     8  Self         own address in bytes
//	 16     8  LockGen      lock generation of the writer
//	 24     8  Seq          sequence of the checkpoint that wrote it
//	 32     8  Birth        epoch of the youngest change in or below it
//	 40     4  Slot         of the object that owns the node
//	 44     2  Incarnation
//	 46     1  Kind         1 map, 2 slab table, 3 snapshot table
//	 47     1  Level        0 is a leaf
//	 48     2  Count        entries, or pointers above level 0
//	 50    14  reserved
//	 64  4032  entries, in ascending order of their keys; zero behind the last
type NodeHead struct {
	LockGen, Seq, Birth uint64
	Owner               Ref
	Kind                TreeKind
	Level               uint8
	Count               int
}

// Node sizes.
const (
	NodeHeadBytes = 64
	NodeRoom      = BlockBytes - NodeHeadBytes
	MaxPointers   = NodeRoom / PointerBytes
	nodeMagic     = 0x444e5442 // "BTND"
)

// SealNode writes the head into b, whose entries are in place, and returns its CRC.
func (s Seed) SealNode(b []byte, blk uint64, h NodeHead) uint32 {
	off := int64(blk) * BlockBytes
	clear(b[:NodeHeadBytes])
	le.PutUint32(b[4:], nodeMagic)
	le.PutUint64(b[8:], uint64(off))
	le.PutUint64(b[16:], h.LockGen)
	le.PutUint64(b[24:], h.Seq)
	le.PutUint64(b[32:], h.Birth)
	le.PutUint32(b[40:], h.Owner.Slot)
	le.PutUint16(b[44:], h.Owner.Incarnation)
	b[46], b[47] = byte(h.Kind), h.Level
	le.PutUint16(b[48:], uint16(h.Count))
	crc := s.sum(b[:BlockBytes], off)
	le.PutUint32(b, crc)
	return crc
}

// OpenNode checks that b is the node of kind that p points to. entryBytes is the
// length of a leaf entry of the kind.
func (s Seed) OpenNode(b []byte, kind TreeKind, p Pointer, entryBytes int) (NodeHead, error) {
	off := int64(p.Block) * BlockBytes
	bad := func(format string, args ...any) (NodeHead, error) {
		return NodeHead{}, corrupt("tree node", off, format, args...)
	}
	if len(b) != BlockBytes {
		return bad("%d bytes", len(b))
	}
	crc := le.Uint32(b)
	if got := s.sum(b, off); got != crc {
		return bad("checksum %08x, computed %08x", crc, got)
	}
	h := NodeHead{
		LockGen: le.Uint64(b[16:]), Seq: le.Uint64(b[24:]), Birth: le.Uint64(b[32:]),
		Owner: Ref{Slot: le.Uint32(b[40:]), Incarnation: le.Uint16(b[44:])},
		Kind:  TreeKind(b[46]), Level: b[47], Count: int(le.Uint16(b[48:])),
	}
	if h.Level > 0 {
		entryBytes = PointerBytes
	}
	switch {
	case le.Uint32(b[4:]) != nodeMagic:
		return bad("not a tree node")
	case le.Uint64(b[8:]) != uint64(off):
		return bad("belongs at byte %d", le.Uint64(b[8:]))
	case crc != p.CRC || h.LockGen != p.LockGen || h.Seq != p.Seq || h.Birth != p.Birth:
		return bad("version %d.%d birth %d checksum %08x, its parent names %d.%d birth %d checksum %08x",
			h.LockGen, h.Seq, h.Birth, crc, p.LockGen, p.Seq, p.Birth, p.CRC)
	case h.Kind != kind || h.Level != p.Level:
		return bad("kind %d level %d where kind %d level %d belongs", h.Kind, h.Level, kind, p.Level)
	case !p.Foreign && h.Owner != s.Owner:
		return bad("belongs to object %d.%d", h.Owner.Slot, h.Owner.Incarnation)
	case h.Count == 0 || h.Count*entryBytes > NodeRoom:
		return bad("%d entries", h.Count)
	}
	return h, nil
}

// Extent maps Length logical blocks onto consecutive physical blocks.
//
//	off  size  field
//	  0     8  bits 0..39 Logical block, bits 40..63 Length - 1
//	  8     8  bits 0..39 Physical block, bit 63 FOREIGN
//	 16     8  Birth    epoch in which the blocks were mapped
type Extent struct {
	Logical, Physical, Birth uint64
	Length                   uint32 // blocks, 1..MaxExtent
	Foreign                  bool   // the blocks belong to another object
}

// Extent sizes.
const (
	ExtentBytes = 24
	MaxExtent   = 1 << 24 // blocks
	MaxExtents  = NodeRoom / ExtentBytes
)

// Key is the first logical block.
func (e Extent) Key() uint64 { return e.Logical }

// End is the key after the last one covered.
func (e Extent) End() uint64 { return e.Logical + uint64(e.Length) }

// Put encodes e into b.
func (e Extent) Put(b []byte) {
	le.PutUint64(b[0:], e.Logical|uint64(e.Length-1)<<40)
	le.PutUint64(b[8:], address(e.Physical, e.Foreign))
	le.PutUint64(b[16:], e.Birth)
}

// GetExtent decodes an extent.
func GetExtent(b []byte) (Extent, error) {
	w := le.Uint64(b)
	e := Extent{Logical: w & (1<<40 - 1), Length: uint32(w>>40) + 1, Birth: le.Uint64(b[16:])}
	var err error
	if e.Physical, e.Foreign, err = splitAddress(le.Uint64(b[8:])); err != nil {
		return Extent{}, err
	}
	if e.End() > MaxKeys || e.Physical+uint64(e.Length)-1 > MaxBlock {
		return Extent{}, fmt.Errorf("extent of %d blocks at %d to %d is out of range", e.Length, e.Logical, e.Physical)
	}
	return e, nil
}

// SlabKind tells what a slab of the disk holds. The values are part of the format.
type SlabKind uint8

// What a slab may hold.
const (
	SlabData SlabKind = 1
	SlabTree SlabKind = 2
	SlabLog  SlabKind = 3
)

func (k SlabKind) valid() bool { return k >= SlabData && k <= SlabLog }

// Slab is an entry of the slab table: a slab that the disk owns and which of its
// blocks the checkpoint's trees reach.
//
//	off  size  field
//	  0     8  Number   address in bytes / 1 MiB
//	  8     1  Kind     1 data, 2 tree, 3 log
//	  9     7  reserved
//	 16    32  Used     bit i (byte i/8, bit i%8) is block i
type Slab struct {
	Number uint64
	Kind   SlabKind
	Used   [4]uint64
}

// SlabEntryBytes is the length of an encoded Slab.
const SlabEntryBytes = 48

// Key is the slab's number.
func (s Slab) Key() uint64 { return s.Number }

// End is the next slab's number.
func (s Slab) End() uint64 { return s.Number + 1 }

// Put encodes s into b.
func (s Slab) Put(b []byte) {
	clear(b[:SlabEntryBytes])
	le.PutUint64(b, s.Number)
	b[8] = byte(s.Kind)
	for i, w := range s.Used {
		le.PutUint64(b[16+8*i:], w)
	}
}

// GetSlab decodes a slab table entry.
func GetSlab(b []byte) (Slab, error) {
	s := Slab{Number: le.Uint64(b), Kind: SlabKind(b[8])}
	if !validSlab(s.Number) || !s.Kind.valid() {
		return Slab{}, fmt.Errorf("slab %d of kind %d", s.Number, s.Kind)
	}
	for i := range s.Used {
		s.Used[i] = le.Uint64(b[16+8*i:])
	}
	return s, nil
}

func validSlab(n uint64) bool { return n > 0 && n <= MaxBlock/BlocksPerSlab }
