package vmfs

import (
	"fmt"

	"basalt/block"
)

// The places and sizes of a volume, in bytes from the start of the device unless
// named otherwise. docs/format/volume.md is their description.
const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30

	SlabBytes       = mib            // what the owner table hands out
	SlabsPerGroup   = gib / mib      // one group is 1 GiB
	SuperblockOff   = 1 * mib        // first copy; the first MiB is left alone
	VolumeUnitOff   = 1*mib + 64*kib // the volume's shared counters, one unit
	HeartbeatOff    = 2 * mib        // 256 × 4 KiB
	RegisterOff     = 3 * mib        // 256 × 4 KiB
	ScratchOff      = 4 * mib        // 256 × 4 KiB, for the mount self-test
	ScratchUnits    = 256            //
	GroupsOff       = 16 * mib       // 5–16 MiB is kept for Disk Paxos locks
	StrideBytes     = 4 * kib        // between units that lie alone
	Slots           = 256            // hosts on a volume
	SuperblockBytes = 4 * kib        //
	MiddleOff       = 512 * kib      // second superblock copy, in the middle group's head slab

	ObjectBytes      = 32 * kib // one object's place in the table
	lockOff          = 0        // within ObjectBytes
	identityOff      = 4 * kib  //
	headerAOff       = 8 * kib  //
	headerBOff       = 20 * kib //
	HeaderBytes      = 12 * kib //
	TableSlabs       = 8        // slabs 1..8 of a group
	ObjectsPerGroup  = TableSlabs * SlabBytes / ObjectBytes
	MaxObjects       = 1 << 20
	maxTableGroups   = MaxObjects / ObjectsPerGroup
	MaxIncarnation   = 1<<12 - 1
	MaxVolumeBytes   = 64 << 40
	MinVolumeBytes   = 64 * mib
	MaxNameBytes     = 255
	MaxFolderEntries = 10000

	// reserveSlabs at the end of group 0 are claimed only for metadata, so that
	// deleting and discarding work on a full volume.
	reserveSlabs = 8

	volumeSlot = 0 // the object whose lock is the volume lock
	rootSlot   = 1 // the root folder
)

// Ref names one life of one object slot.
type Ref struct {
	Slot        uint32 // 0..MaxObjects-1
	Incarnation uint16 // 1..MaxIncarnation
}

func (r Ref) String() string { return fmt.Sprintf("%d.%d", r.Slot, r.Incarnation) }

// tag is the mark of an object in the owner table: slot in the upper 20 bits,
// incarnation in the lower 12. 0 is a free slab.
func (r Ref) tag() uint32 { return r.Slot<<12 | uint32(r.Incarnation) }

func refOfTag(tag uint32) Ref {
	return Ref{Slot: tag >> 12, Incarnation: uint16(tag & MaxIncarnation)}
}

// systemTag marks the slabs of the volume's own structures: the volume object.
const systemTag = volumeSlot<<12 | 1

// geometry computes every address of a volume from three numbers.
type geometry struct {
	sizeBytes int64 // of the volume, a whole number of MiB; the last MiB holds the tail superblock
	unitBytes int   // 512 or 4096
}

// slabs is the number of slab numbers: every slab lies wholly in front of the
// tail MiB.
func (g geometry) slabs() int64 { return (g.sizeBytes - mib - GroupsOff) / SlabBytes }

func (g geometry) groups() int64 { return (g.slabs() + SlabsPerGroup - 1) / SlabsPerGroup }

// groupSlabs is the number of slabs of a group; only the last has fewer than 1024.
func (g geometry) groupSlabs(group int64) int {
	return int(min(g.slabs()-group*SlabsPerGroup, SlabsPerGroup))
}

func (g geometry) tailOff() int64 { return g.sizeBytes - mib }

func groupOff(group int64) int64 { return GroupsOff + group*gib }

// SlabOff is a slab's address in bytes.
func SlabOff(slab int64) int64 { return GroupsOff + slab*SlabBytes }

// SlabAt is the inverse of SlabOff for any address within a slab.
func SlabAt(offBytes int64) int64 { return (offBytes - GroupsOff) / SlabBytes }

// hasTable reports whether the group holds a part of the object table: one that
// is too short for data beside it does not.
func (g geometry) hasTable(group int64) bool {
	return group < maxTableGroups && g.groupSlabs(group) >= 4*TableSlabs
}

// tableGroups is how many groups, counted from 0, can hold parts of the table.
func (g geometry) tableGroups() int64 {
	n := min(g.groups(), maxTableGroups)
	if n > 0 && !g.hasTable(n-1) {
		n--
	}
	return n
}

func objectOff(slot uint32) int64 {
	group, i := int64(slot/ObjectsPerGroup), int64(slot%ObjectsPerGroup)
	return groupOff(group) + SlabBytes + i*ObjectBytes
}

// tagsPerUnit is the number of owner tags in one unit.
func (g geometry) tagsPerUnit() int { return (g.unitBytes - 24) / 4 }

// unitsPerGroup is the number of owner-table units at the head of each group.
func (g geometry) unitsPerGroup() int {
	t := g.tagsPerUnit()
	return (SlabsPerGroup + t - 1) / t
}

// Owner-table units are numbered through: group * unitsPerGroup + index.

func (g geometry) tableUnits() uint32 { return uint32(g.groups() * int64(g.unitsPerGroup())) }

func (g geometry) unitOff(unit uint32) int64 {
	per := uint32(g.unitsPerGroup())
	return groupOff(int64(unit/per)) + int64(unit%per)*int64(g.unitBytes)
}

// unitSlabs gives the slab numbers [first, end) whose tags a unit holds.
func (g geometry) unitSlabs(unit uint32) (first, end int64) {
	per, t := uint32(g.unitsPerGroup()), int64(g.tagsPerUnit())
	group := int64(unit / per)
	i := int64(unit % per)
	first = group*SlabsPerGroup + min(i*t, SlabsPerGroup)
	end = group*SlabsPerGroup + min((i+1)*t, SlabsPerGroup)
	return min(first, g.slabs()), min(end, g.slabs())
}

// unitOfSlab gives the unit that holds a slab's tag, and the tag's index in it.
func (g geometry) unitOfSlab(slab int64) (unit uint32, index int) {
	t := g.tagsPerUnit()
	in := int(slab % SlabsPerGroup)
	return uint32(slab/SlabsPerGroup)*uint32(g.unitsPerGroup()) + uint32(in/t), in % t
}

// reserved reports whether a slab is kept for metadata claims.
func (g geometry) reserved(slab int64) bool {
	end := int64(g.groupSlabs(0))
	return slab >= end-reserveSlabs && slab < end
}

// geometryFor rounds a device of the given geometry down to a volume's.
func geometryFor(d block.Geometry) (geometry, error) {
	size := min(d.SizeBytes, MaxVolumeBytes) / mib * mib
	if size < MinVolumeBytes {
		return geometry{}, fmt.Errorf("%w: %d bytes are fewer than the %d MiB a volume needs", ErrTooSmall, d.SizeBytes, MinVolumeBytes/mib)
	}
	return geometry{sizeBytes: size, unitBytes: d.UnitBytes}, nil
}
