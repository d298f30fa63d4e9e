package vmfs

import (
	"encoding/binary"

	"basalt/block/unit"
)

// An owner-table unit is the unit's head followed by one u32 tag a slab: object
// slot << 12 | incarnation, 0 for a free slab. 122 tags fit in 512 bytes, 1018 in
// 4096; tags past the group's or the volume's last slab are zero.

func tagAt(img []byte, index int) uint32 {
	return binary.LittleEndian.Uint32(img[unit.HeadBytes+4*index:])
}

func setTag(body []byte, index int, tag uint32) {
	binary.LittleEndian.PutUint32(body[4*index:], tag)
}

// bodyOf copies the body of a unit, to be changed and swapped in.
func bodyOf(img []byte) []byte {
	return append([]byte(nil), img[unit.HeadBytes:]...)
}

// volumeRecord is the body of the volume unit (offsets from the unit's start).
//
//	off  size  field
//	 24     4  TableGroups  groups, counted from 0, whose part of the object table is initialised
//	 28     4  reserved
type volumeRecord struct {
	TableGroups uint32
}

func (r volumeRecord) encode(img []byte) []byte {
	body := bodyOf(img)
	binary.LittleEndian.PutUint32(body, r.TableGroups)
	return body
}

func decodeVolumeRecord(p unit.Place, img []byte, g geometry) (volumeRecord, error) {
	r := volumeRecord{TableGroups: binary.LittleEndian.Uint32(img[24:])}
	if r.TableGroups == 0 || int64(r.TableGroups) > g.tableGroups() {
		return r, corruptUnit(p, "object table of %d groups, at most %d fit", r.TableGroups, g.tableGroups())
	}
	return r, nil
}
