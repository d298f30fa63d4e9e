package vmfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"
	"unicode/utf8"

	"basalt/block"
	"basalt/block/unit"
)

// Entry is a name in a folder. The identity unit of Ref is the truth: an entry
// that disagrees with it is stale (R4).
type Entry struct {
	Ref  Ref
	Kind Kind
	Name string
}

// CheckName tells whether s can be the name of an object or host: 1 to 255 bytes
// of UTF-8 without '@', ':', '/', NUL or control characters, and not "." or "..".
func CheckName(s string) error {
	switch {
	case s == "":
		return fmt.Errorf("%w: it is empty", ErrName)
	case len(s) > MaxNameBytes:
		return fmt.Errorf("%w: %d bytes, at most %d are possible", ErrName, len(s), MaxNameBytes)
	case s == "." || s == "..":
		return fmt.Errorf("%w: %q", ErrName, s)
	case !utf8.ValidString(s):
		return fmt.Errorf("%w: %q is not UTF-8", ErrName, s)
	}
	if i := strings.IndexFunc(s, func(r rune) bool {
		return r == '@' || r == ':' || r == '/' || r < 0x20 || (r >= 0x7f && r < 0xa0)
	}); i >= 0 {
		return fmt.Errorf("%w: %q holds %q", ErrName, s, s[i:i+1])
	}
	return nil
}

// A folder's payload is its content.
//
//	off  size  field
//	  0     1  Form       1: entries inline, 2: in blocks
//	  1     3  reserved
//	  4     4  number of entries
//	  8     2  number of slabs, 0..8
//	 10     2  number of blocks (form 2), 0..700
//	 12     4  bytes of inline entries (form 1)
//	 16    32  slab numbers, u32 each
//	 48   ...  form 1: entries; form 2: block pointers, 16 bytes each:
//	           address u64 (bytes), CRC u32 of the block, used bytes u16, entries u16
//
// An entry is slot u32, incarnation u16, kind u8, name length u8, name. A block is
// 4 KiB in one of the folder's slabs, written once: a 32-byte head {CRC, magic
// "BFLD", slot u32, incarnation u16, entries u16, used u32, reserved}, then
// entries.
const (
	formInline   = 1
	formBlocks   = 2
	folderHead   = 48
	folderSlabs  = 8
	folderBlocks = 700
	blockPtr     = 16
	folderBlock  = 4 * kib
	blockHead    = 32
	blockMagic   = 0x444c4642 // "BFLD"
	entryHead    = 8
	inlineMax    = MaxPayload - folderHead
	blockMax     = folderBlock - blockHead
)

func entryBytes(e Entry) int { return entryHead + len(e.Name) }

func appendEntry(b []byte, e Entry) []byte {
	b = binary.LittleEndian.AppendUint32(b, e.Ref.Slot)
	b = binary.LittleEndian.AppendUint16(b, e.Ref.Incarnation)
	b = append(b, byte(e.Kind), byte(len(e.Name)))
	return append(b, e.Name...)
}

// decodeEntries reads n entries that fill b exactly.
func decodeEntries(b []byte, n int) ([]Entry, error) {
	if n > len(b)/entryHead {
		return nil, fmt.Errorf("%d entries in %d bytes", n, len(b))
	}
	out := make([]Entry, 0, n)
	for range n {
		if len(b) < entryHead || len(b) < entryHead+int(b[7]) {
			return nil, fmt.Errorf("entry %d is cut off", len(out))
		}
		e := Entry{
			Ref:  Ref{binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint16(b[4:])},
			Kind: Kind(b[6]),
			Name: string(b[entryHead : entryHead+int(b[7])]),
		}
		if e.Ref.Slot >= MaxObjects || e.Ref.Incarnation == 0 || e.Ref.Incarnation > MaxIncarnation {
			return nil, fmt.Errorf("entry %d names object %v", len(out), e.Ref)
		}
		if err := CheckName(e.Name); err != nil {
			return nil, fmt.Errorf("entry %d: %w", len(out), err)
		}
		out = append(out, e)
		b = b[entryHead+len(e.Name):]
	}
	if len(b) != 0 {
		return nil, fmt.Errorf("%d bytes after the last entry", len(b))
	}
	return out, nil
}

type folderBlockPtr struct {
	off     int64
	crc     uint32
	used    int
	entries int
}

// FolderContent is a decoded folder payload.
type FolderContent struct {
	form    byte
	inline  []Entry // form 1
	entries int     // in all
	slabs   []int64
	blocks  []folderBlockPtr // form 2
}

// Encode returns the payload.
func (c *FolderContent) Encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, folderHead, MaxPayload)
	b[0] = c.form
	le.PutUint32(b[4:], uint32(c.entries))
	le.PutUint16(b[8:], uint16(len(c.slabs)))
	for i, s := range c.slabs {
		le.PutUint32(b[16+4*i:], uint32(s))
	}
	if c.form == formInline {
		for _, e := range c.inline {
			b = appendEntry(b, e)
		}
		le.PutUint32(b[12:], uint32(len(b)-folderHead))
		return b
	}
	le.PutUint16(b[10:], uint16(len(c.blocks)))
	for _, p := range c.blocks {
		b = le.AppendUint64(b, uint64(p.off))
		b = le.AppendUint32(b, p.crc)
		b = le.AppendUint16(b, uint16(p.used))
		b = le.AppendUint16(b, uint16(p.entries))
	}
	return b
}

// DecodeFolder reads a folder's payload.
func DecodeFolder(b []byte) (*FolderContent, error) {
	if len(b) < folderHead {
		return nil, fmt.Errorf("folder content of %d bytes", len(b))
	}
	le := binary.LittleEndian
	c := &FolderContent{form: b[0], entries: int(le.Uint32(b[4:]))}
	slabs, blocks, inline := int(le.Uint16(b[8:])), int(le.Uint16(b[10:])), int(le.Uint32(b[12:]))
	if slabs > folderSlabs || c.entries > MaxFolderEntries {
		return nil, fmt.Errorf("folder of %d slabs and %d entries", slabs, c.entries)
	}
	for i := range slabs {
		c.slabs = append(c.slabs, int64(le.Uint32(b[16+4*i:])))
	}
	if !isZero(b[1:4]) || !isZero(b[16+4*slabs:folderHead]) {
		return nil, errors.New("reserved bytes are not zero")
	}
	rest := b[folderHead:]
	switch c.form {
	case formInline:
		if inline != len(rest) || blocks != 0 {
			return nil, fmt.Errorf("%d bytes of entries in %d, and %d blocks", inline, len(rest), blocks)
		}
		var err error
		c.inline, err = decodeEntries(rest, c.entries)
		return c, err
	case formBlocks:
		if inline != 0 || blocks > folderBlocks || blocks*blockPtr != len(rest) {
			return nil, fmt.Errorf("%d blocks and %d bytes of entries in %d bytes", blocks, inline, len(rest))
		}
		return c, c.decodePointers(rest)
	}
	return nil, fmt.Errorf("folder content of form %d", c.form)
}

// decodePointers reads the block pointers that fill b. Each lies in one of the
// folder's slabs, and no two are the same.
func (c *FolderContent) decodePointers(b []byte) error {
	le := binary.LittleEndian
	seen := map[int64]bool{}
	total := 0
	for p := b; len(p) > 0; p = p[blockPtr:] {
		f := folderBlockPtr{int64(le.Uint64(p)), le.Uint32(p[8:]), int(le.Uint16(p[12:])), int(le.Uint16(p[14:]))}
		if f.used > blockMax || f.off < GroupsOff || f.off%folderBlock != 0 || seen[f.off] || !slices.Contains(c.slabs, SlabAt(f.off)) {
			return fmt.Errorf("block %d: %d bytes at %d", len(c.blocks), f.used, f.off)
		}
		seen[f.off] = true
		total += f.entries
		c.blocks = append(c.blocks, f)
	}
	if total != c.entries {
		return fmt.Errorf("%d entries in blocks, %d in all", total, c.entries)
	}
	return nil
}

// encodeBlock fills b, one zeroed folder block for offBytes, and returns its pointer.
func encodeBlock(b []byte, volume [16]byte, folder Ref, offBytes int64, entries []Entry) folderBlockPtr {
	le := binary.LittleEndian
	body := b[blockHead:blockHead]
	for _, e := range entries {
		body = appendEntry(body, e)
	}
	le.PutUint32(b[4:], blockMagic)
	le.PutUint32(b[8:], folder.Slot)
	le.PutUint16(b[12:], folder.Incarnation)
	le.PutUint16(b[14:], uint16(len(entries)))
	le.PutUint32(b[16:], uint32(len(body)))
	crc := crc32.Update(unit.Seed(volume, offBytes), unit.Castagnoli, b[4:folderBlock])
	le.PutUint32(b, crc)
	return folderBlockPtr{off: offBytes, crc: crc, used: len(body), entries: len(entries)}
}

func decodeBlock(b []byte, volume [16]byte, folder Ref, p folderBlockPtr) ([]Entry, error) {
	bad := func(reason string) error {
		return &block.CorruptError{Object: fmt.Sprintf("block of folder %v", folder), OffBytes: p.off, Reason: reason}
	}
	le := binary.LittleEndian
	got := crc32.Update(unit.Seed(volume, p.off), unit.Castagnoli, b[4:folderBlock])
	if got != le.Uint32(b) || got != p.crc {
		return nil, bad(fmt.Sprintf("checksum %08x, the folder expects %08x", got, p.crc))
	}
	if le.Uint32(b[4:]) != blockMagic || le.Uint32(b[8:]) != folder.Slot || le.Uint16(b[12:]) != folder.Incarnation ||
		int(le.Uint16(b[14:])) != p.entries || int(le.Uint32(b[16:])) != p.used {
		return nil, bad("is of another folder or another size")
	}
	entries, err := decodeEntries(b[blockHead:blockHead+p.used], p.entries)
	if err != nil {
		return nil, bad(err.Error())
	}
	return entries, nil
}
