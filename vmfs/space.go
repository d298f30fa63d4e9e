package vmfs

import (
	"context"

	"basalt/lease"
)

// Space is how the volume's bytes are used.
type Space struct {
	SizeBytes    int64 // of the volume
	SystemBytes  int64 // its own structures
	UsedBytes    int64 // slabs of objects
	FreeBytes    int64 // slabs of nobody, the reserve included
	ReserveBytes int64 // of the free ones, kept for metadata
}

// Space reads the owner table and adds up.
func (v *Volume) Space(ctx context.Context) (Space, error) {
	s := Space{SizeBytes: v.geo.sizeBytes}
	err := v.eachTag(ctx, func(slab int64, tag uint32) {
		switch tag {
		case 0:
			s.FreeBytes += SlabBytes
			if v.geo.reserved(slab) {
				s.ReserveBytes += SlabBytes
			}
		case systemTag:
		default:
			s.UsedBytes += SlabBytes
		}
	})
	s.SystemBytes = s.SizeBytes - s.UsedBytes - s.FreeBytes
	return s, err
}

// Hosts reads all slots once.
func (v *Volume) Hosts(ctx context.Context) ([]lease.SlotView, error) {
	return lease.Observe(ctx, v.dev, areaOf(&v.sb))
}

// LockOf reads who has an object locked.
func (v *Volume) LockOf(ctx context.Context, ref Ref) (*LockRecord, error) {
	return v.readLock(ctx, ref.Slot)
}

// LocksHeld counts, for each holder, the objects that it has locked.
func (v *Volume) LocksHeld(ctx context.Context) (map[Holder]int, error) {
	groups, err := v.tableGroups(ctx)
	if err != nil {
		return nil, err
	}
	held := map[Holder]int{}
	for slot := range groups * ObjectsPerGroup {
		l, err := v.readLock(ctx, slot)
		if err != nil {
			return nil, err
		}
		switch l.Mode {
		case LockExclusive, LockMultiWriter:
			held[l.Owner]++
		case LockShared:
			for _, h := range l.Shared {
				held[h]++
			}
		}
	}
	return held, nil
}
