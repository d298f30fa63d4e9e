package thinprov

import (
	"context"
	"fmt"

	"basalt/block"
	"basalt/thinprov/cowtree"
	"basalt/thinprov/layout"
)

// recover loads the newest checkpoint and replays the log behind it, in memory. It
// returns how many records there were.
func (d *Disk) recover(ctx context.Context) (int, error) {
	payload, err := d.store.ReadHeader(ctx)
	if err != nil {
		return 0, err
	}
	h, err := layout.DecodeHeader(d.seed.Volume, payload)
	if err != nil {
		return 0, err
	}
	d.readOnly = d.readOnly || h.ReadOnly
	clean := h.Flags&layout.HeaderClean != 0
	switch {
	case h.Self != d.seed.Owner:
		return 0, headerCorrupt("header of object %d.%d", h.Self.Slot, h.Self.Incarnation)
	case len(h.Ring) < layout.MinLogSlabs:
		return 0, headerCorrupt("the disk was not created to the end")
	case h.Flags&(layout.HeaderMoving|layout.HeaderTailInUse) != 0:
		return 0, headerCorrupt("flags %#x", h.Flags)
	case !d.readOnly && (d.lockGen < h.LockGen || d.lockGen == h.LockGen && !clean):
		return 0, fmt.Errorf("%w: %d, the header's is %d", ErrStale, d.lockGen, h.LockGen)
	}
	copy(d.header, payload)
	d.uuid, d.size, d.created = h.UUID, h.SizeBytes, h.Created
	d.origin, d.originEpoch = h.Origin, h.OriginEpoch
	d.epoch, d.parent, d.checkpoint = h.Epoch, h.Parent, h.Checkpoint
	d.mapped, d.own = h.Mapped, h.Own
	d.clean, d.releasing = clean, h.Releasing
	if h.ClaimKind != 0 {
		d.claim = &claim{kind: h.ClaimKind, units: h.ClaimUnits}
	}
	d.head = cowtree.FromPointer[layout.Extent](h.Map)
	if err := d.loadSlabs(ctx, h); err != nil {
		return 0, err
	}
	if err := d.loadSnapshots(ctx, h); err != nil {
		return 0, err
	}
	at := logMark{pos: h.LogOff, seq: h.LogSeq, prev: h.LogPrev}
	d.ring = ring{slabs: h.Ring, end: at, frozen: at.pos, keep: at.pos}
	return d.replay(ctx, h.LockGen)
}

func headerCorrupt(format string, args ...any) error {
	return &block.CorruptError{Object: "disk header", Reason: fmt.Sprintf(format, args...)}
}

// loadTable brings all nodes of a small tree into memory.
func loadTable[E cowtree.Entry](ctx context.Context, d *Disk, t cowtree.Tree[E], kind *cowtree.Kind[E]) error {
	b := block.AlignedBuffer(BlockBytes)
	return t.Walk(func(*cowtree.Node[E]) bool { return true }, func(h *cowtree.Hole[E]) error {
		if err := d.store.ReadAt(ctx, b, int64(h.Node.Block())*BlockBytes); err != nil {
			return err
		}
		c, err := h.Decode(kind, d.seed, b)
		if err == nil {
			h.Install(c)
		}
		return err
	}, func(*cowtree.Node[E]) {})
}

func (d *Disk) loadSlabs(ctx context.Context, h layout.Header) error {
	d.slabTree = cowtree.FromPointer[layout.Slab](h.Slabs)
	if err := loadTable(ctx, d, d.slabTree, &slabKind); err != nil {
		return fmt.Errorf("slab table: %w", err)
	}
	var bad error
	d.slabTree.Scan(0, cowtree.MaxKey, func(e layout.Slab) bool {
		bad = d.alloc.add(&slab{num: e.Number, kind: e.Kind, used: e.Used})
		return bad == nil
	})
	for _, num := range h.Ring {
		if s := d.alloc.slabs[num]; s == nil || s.kind != layout.SlabLog {
			bad = firstOf(bad, headerCorrupt("slab %d of the log is not in the slab table", num))
		}
	}
	return bad
}

func (d *Disk) loadSnapshots(ctx context.Context, h layout.Header) error {
	d.snapTree = cowtree.FromPointer[snapEntry](h.Snapshots)
	if err := loadTable(ctx, d, d.snapTree, &snapKind); err != nil {
		return fmt.Errorf("snapshot table: %w", err)
	}
	d.snapTree.Scan(0, cowtree.MaxKey, func(e snapEntry) bool {
		s := &snapshot{Snapshot: e.Snapshot, root: e.root}
		d.snaps = append(d.snaps, s)
		if s.Flags&layout.SnapshotDeleting != 0 {
			d.deleting = s
		}
		return true
	})
	if len(d.snaps) > layout.MaxSnapshots {
		return headerCorrupt("%d snapshots", len(d.snaps))
	}
	parent := uint64(0)
	for _, s := range d.snaps {
		if s.Flags&layout.SnapshotDeleting != 0 && s != d.deleting {
			return headerCorrupt("two snapshots are being deleted")
		}
		if s.Parent != parent || s.Epoch >= d.epoch {
			return headerCorrupt("snapshot of epoch %d after %d where %d was expected", s.Epoch, s.Parent, parent)
		}
		parent = s.Epoch
	}
	if d.parent != parent {
		return headerCorrupt("head after epoch %d, the newest snapshot is of %d", d.parent, parent)
	}
	return nil
}

// replay applies the records behind the checkpoint. It ends at the first that does
// not continue the chain of sequences and checksums (R13); a record that does, and
// still makes no sense, is damage.
func (d *Disk) replay(ctx context.Context, lockGen uint64) (int, error) {
	start, records := d.ring.end.pos, 0
	head := block.AlignedBuffer(BlockBytes)
	for {
		mark := d.ring.end
		at := d.ring.offset(mark.pos)
		if err := d.store.ReadAt(ctx, head, at); err != nil {
			return 0, fmt.Errorf("log: %w", err)
		}
		n := layout.RecordLength(head)
		if n == 0 || mark.pos%SlabBytes+uint64(n) > SlabBytes || mark.pos-start+uint64(n) > d.ring.size() {
			return records, nil
		}
		rec := head
		if n > BlockBytes {
			rec = block.AlignedBuffer(n)
			if err := d.store.ReadAt(ctx, rec, at); err != nil {
				return 0, fmt.Errorf("log: %w", err)
			}
		}
		r, crc, err := d.seed.OpenRecord(rec, at)
		if err != nil || r.Seq != mark.seq || r.Prev != mark.prev || r.LockGen < lockGen {
			return records, nil // what does not continue the chain is not part of the log
		}
		if !d.readOnly && r.LockGen >= d.lockGen {
			return 0, fmt.Errorf("%w: %d, the log's is %d", ErrStale, d.lockGen, r.LockGen)
		}
		if err := d.replayRecord(ctx, rec[layout.RecordHeadBytes:layout.RecordHeadBytes+r.Used]); err != nil {
			return 0, fmt.Errorf("log record %d: %w", r.Seq, err)
		}
		lockGen = r.LockGen
		d.ring.end = logMark{pos: mark.pos + uint64(n), seq: mark.seq + 1, prev: crc}
		records++
	}
}

func (d *Disk) replayRecord(ctx context.Context, entries []byte) error {
	for len(entries) > 0 {
		e, rest, err := layout.NextEntry(entries)
		if err != nil {
			return logCorrupt("%v", err)
		}
		entries = rest
		var refused error
		at := uint64(0)
		err = d.rd.with(ctx, func() *mapHole {
			if h := d.need(e, &at); h != nil {
				return h
			}
			var frees []run
			frees, refused = d.apply(e)
			for _, r := range frees { // no I/O is in progress, and the record is on media
				if refused == nil {
					d.alloc.letGo(r)
				}
			}
			return nil
		})
		if err = firstOf(err, refused, d.failed); err != nil {
			return err
		}
	}
	return nil
}
