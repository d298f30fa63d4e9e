package thinprov

import (
	"context"
	"fmt"
	"slices"
	"time"

	"basalt/thinprov/layout"
)

// snapshot is a row of the snapshot table, and its map.
type snapshot struct {
	layout.Snapshot
	root  mapTree
	views int // open views
}

// Snapshot describes a snapshot of a disk.
type Snapshot struct {
	UUID        [16]byte
	Name        string
	Created     time.Time
	SizeBytes   int64
	Epoch       uint64 // the last whose changes it holds; never repeats on a disk
	Parent      uint64 // epoch of the snapshot before it, 0 if none
	MappedBytes int64
	Published   Ref // the object that shows it to others; zero if none
}

func (s *snapshot) describe() Snapshot {
	return Snapshot{
		UUID: s.UUID, Name: s.Name, Created: time.Unix(0, s.Created).UTC(), SizeBytes: s.SizeBytes,
		Epoch: s.Epoch, Parent: s.Parent, MappedBytes: int64(s.Mapped) * BlockBytes, Published: s.Published,
	}
}

const unseen = layout.SnapshotHidden | layout.SnapshotDeleting

func (d *Disk) snapByEpoch(epoch uint64) *snapshot {
	i, found := slices.BinarySearchFunc(d.snaps, epoch, func(s *snapshot, e uint64) int {
		switch {
		case s.Epoch < e:
			return -1
		case s.Epoch > e:
			return 1
		}
		return 0
	})
	if !found {
		return nil
	}
	return d.snaps[i]
}

// visibleLocked finds a snapshot that is not being deleted.
func (d *Disk) visibleLocked(uuid [16]byte) (*snapshot, error) {
	for _, s := range d.snaps {
		if s.UUID == uuid && s.Flags&unseen == 0 {
			return s, nil
		}
	}
	return nil, fmt.Errorf("%w: %x", ErrNotFound, uuid)
}

// Snapshot keeps the disk's content as of now under a name and an id. It waits until
// the writes in progress have ended, and holds later ones back meanwhile; its cost
// does not depend on the disk's size. What a failed write may still change is copied
// first; if that is not possible, there is no snapshot.
func (d *Disk) Snapshot(ctx context.Context, name string, uuid [16]byte) (Snapshot, error) {
	if !layout.CheckName(name) || uuid == ([16]byte{}) {
		return Snapshot{}, fmt.Errorf("%w: %q", ErrName, name)
	}
	if err := d.begin(true); err != nil {
		return Snapshot{}, err
	}
	defer d.end()
	held, err := d.lockRange(ctx, 0, layout.MaxKeys)
	if err != nil {
		return Snapshot{}, err
	}
	// What the snapshot shows may not change any more, not even by a power failure or
	// by a failed write that lands late.
	moved, err := d.moveDoubtful(ctx)
	if err == nil {
		err = d.flushDevice(ctx)
	}
	if err != nil {
		return Snapshot{}, d.finish(ctx, held, moved, err)
	}
	var made Snapshot
	b, err := d.change(ctx, rankChange, func() (layout.Entry, bool, error) {
		for _, s := range d.snaps {
			if s.UUID == uuid || s.Name == name && s.Flags&unseen == 0 {
				return layout.Entry{}, false, fmt.Errorf("%w: %q", ErrExists, name)
			}
		}
		if len(d.snaps) >= layout.MaxSnapshots {
			return layout.Entry{}, false, ErrLimit
		}
		e := layout.Entry{
			Kind: layout.EntrySnapshot, Epoch: d.epoch, Parent: d.parent, UUID: uuid,
			Created: d.clk.Wall().UnixNano(), Name: name,
		}
		return e, true, nil
	}, func() *mapHole { return nil })
	if b != nil {
		d.mu.Lock()
		made = d.snaps[len(d.snaps)-1].describe()
		d.mu.Unlock()
	} else {
		b = moved
	}
	return made, d.finish(ctx, held, b, err)
}

// applySnapshot ends the head's epoch.
func (d *Disk) applySnapshot(e layout.Entry) error {
	if e.Epoch != d.epoch || e.Parent != d.parent || len(d.snaps) >= layout.MaxSnapshots {
		return logCorrupt("snapshot of epoch %d after %d, the head is at %d after %d", e.Epoch, e.Parent, d.epoch, d.parent)
	}
	d.snaps = append(d.snaps, &snapshot{
		Snapshot: layout.Snapshot{
			Epoch: e.Epoch, Parent: e.Parent, UUID: e.UUID, Created: e.Created, Name: e.Name,
			Mapped: d.mapped, SizeBytes: d.size,
		},
		root: d.head,
	})
	d.staleSnaps[e.Epoch] = true
	d.parent = d.epoch
	d.epoch++
	return nil
}

// Snapshots lists the disk's snapshots, oldest first.
func (d *Disk) Snapshots() []Snapshot {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []Snapshot
	for _, s := range d.snaps {
		if s.Flags&unseen == 0 {
			out = append(out, s.describe())
		}
	}
	return out
}

// Publish notes durably that the object ref shows the snapshot to others, writes the
// snapshot's map to media, and returns the header payload of that object. A
// published snapshot cannot be deleted. Publishing it again to the same object
// returns the payload again.
func (d *Disk) Publish(ctx context.Context, uuid [16]byte, ref Ref) ([]byte, error) {
	if err := d.begin(true); err != nil {
		return nil, err
	}
	defer d.end()
	err := d.logAndWait(ctx, rankChange, func() (layout.Entry, bool, error) {
		s, err := d.visibleLocked(uuid)
		if err != nil {
			return layout.Entry{}, false, err
		}
		if s.Published != (Ref{}) && s.Published != ref || ref == (Ref{}) {
			return layout.Entry{}, false, ErrPublished
		}
		return layout.Entry{Kind: layout.EntryPublish, Epoch: s.Epoch, Ref: ref}, s.Published != ref, nil
	})
	if err == nil {
		err = d.awaitCheckpoint(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("thinprov: publish: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	s, err := d.visibleLocked(uuid)
	if err != nil {
		return nil, err
	}
	p := layout.Published{
		UUID: s.UUID, DiskUUID: d.uuid, SizeBytes: s.SizeBytes, Epoch: s.Epoch,
		Origin: d.seed.Owner, Self: ref, Root: s.root.Pointer(), Mapped: s.Mapped, Created: s.Created,
	}
	return p.Encode(d.seed.Volume), nil
}

// Unpublish notes durably that the snapshot's object is gone. The caller knows that
// nobody reads it.
func (d *Disk) Unpublish(ctx context.Context, uuid [16]byte) error {
	if err := d.begin(true); err != nil {
		return err
	}
	defer d.end()
	return d.logAndWait(ctx, rankChange, func() (layout.Entry, bool, error) {
		s, err := d.visibleLocked(uuid)
		if err != nil {
			return layout.Entry{}, false, err
		}
		return layout.Entry{Kind: layout.EntryUnpublish, Epoch: s.Epoch}, s.Published != (Ref{}), nil
	})
}

// logAndWait logs what decide says, if anything, and waits until it is durable.
func (d *Disk) logAndWait(ctx context.Context, k rank, decide func() (layout.Entry, bool, error)) error {
	b, err := d.change(ctx, k, decide, func() *mapHole { return nil })
	if err != nil || b == nil {
		return err
	}
	return d.settled(ctx, b)
}

// Resize makes the disk longer. Making it shorter is not supported.
func (d *Disk) Resize(ctx context.Context, sizeBytes int64) error {
	if err := d.begin(true); err != nil {
		return err
	}
	defer d.end()
	return d.logAndWait(ctx, rankChange, func() (layout.Entry, bool, error) {
		if err := checkSize(sizeBytes); err != nil {
			return layout.Entry{}, false, err
		}
		if sizeBytes < d.size {
			return layout.Entry{}, false, fmt.Errorf("thinprov: resize from %d to %d bytes: %w", d.size, sizeBytes, ErrShrink)
		}
		return layout.Entry{Kind: layout.EntryResize, SizeBytes: sizeBytes}, sizeBytes > d.size, nil
	})
}
