package thinprov

import (
	"context"

	"basalt/thinprov/layout"
)

// Stat tells how a disk uses space.
type Stat struct {
	SizeBytes      int64
	MappedBytes    int64 // what the head maps, inherited and shared included
	ExclusiveBytes int64 // of it, what would become free if the head alone went
	SharedBytes    int64 // the rest: in snapshots, or a clone's origin
	ForeignBytes   int64 // of that, what belongs to a clone's origin
	SlabBytes      int64 // space taken from the volume
	FreeBytes      int64 // of it, free for data without claiming more
	Snapshots      int
	Origin         Ref // of a clone
	LogReplayBytes int64
}

// SnapshotStat tells how a snapshot uses space.
type SnapshotStat struct {
	MappedBytes    int64
	ExclusiveBytes int64 // what deleting it would free
}

// Stat counts. With snapshots it walks what has changed since the newest.
func (d *Disk) Stat(ctx context.Context) (Stat, error) {
	if err := d.begin(false); err != nil {
		return Stat{}, err
	}
	defer d.end()
	exclusive, err := d.exclusive(ctx)
	if err != nil {
		return Stat{}, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	s := Stat{
		SizeBytes: d.size, MappedBytes: int64(d.mapped) * BlockBytes,
		ForeignBytes: int64(d.mapped-d.own) * BlockBytes, FreeBytes: int64(d.alloc.freeData) * BlockBytes,
		SlabBytes: int64(len(d.alloc.slabs)) * SlabBytes, Origin: d.origin,
		LogReplayBytes: int64(d.ring.end.pos - d.ring.frozen),
	}
	if d.parent == 0 {
		exclusive = d.own
	}
	s.ExclusiveBytes = min(int64(exclusive)*BlockBytes, s.MappedBytes) // it was counted a moment earlier
	s.SharedBytes = s.MappedBytes - s.ExclusiveBytes
	for _, x := range d.snaps {
		if x.Flags&unseen == 0 {
			s.Snapshots++
		}
	}
	return s, nil
}

// exclusive counts the head's own blocks, giving up mu from time to time.
func (d *Disk) exclusive(ctx context.Context) (uint64, error) {
	total := uint64(0)
	for at := uint64(0); at < layout.MaxKeys; {
		next := layout.MaxKeys
		part := uint64(0)
		err := d.rd.with(ctx, func() *mapHole {
			next, part = layout.MaxKeys, 0
			if d.parent == 0 {
				return nil
			}
			seen := 0
			return d.head.ScanAfter(at, layout.MaxKeys, min(d.parent, d.oldestOwn()), func(e layout.Extent) bool {
				if seen++; seen > mapStep {
					next = e.Logical
					return false
				}
				d.eachOwn(e, at, e.End(), func(p segment, own bool) {
					if own {
						part += p.count
					}
				})
				return true
			})
		})
		if err != nil {
			return 0, err
		}
		total, at = total+part, next
	}
	return total, nil
}

// oldestOwn is the epoch after which own extents of the head may be born.
func (d *Disk) oldestOwn() uint64 {
	birth, _ := d.ownAfter(0)
	return birth
}

// SnapshotStat counts by a walk over what the snapshot does not share with its parent.
func (d *Disk) SnapshotStat(ctx context.Context, uuid [16]byte) (SnapshotStat, error) {
	if err := d.begin(false); err != nil {
		return SnapshotStat{}, err
	}
	defer d.end()
	var out SnapshotStat
	blocks := uint64(0)
	for at := uint64(0); at < layout.MaxKeys; {
		var refused error
		err := d.rd.with(ctx, func() *mapHole {
			s, err := d.visibleLocked(uuid)
			if refused = err; err != nil {
				return nil
			}
			out.MappedBytes = int64(s.Mapped) * BlockBytes
			st, h := d.stepOf(s, at, 0)
			if h != nil {
				return h
			}
			at = st.to
			for _, r := range st.frees {
				blocks += r.count
			}
			return nil
		})
		if err = firstOf(err, refused); err != nil {
			return SnapshotStat{}, err
		}
	}
	out.ExclusiveBytes = int64(blocks) * BlockBytes
	return out, nil
}
