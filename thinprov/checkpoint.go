package thinprov

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"basalt/block"
	"basalt/thinprov/cowtree"
	"basalt/thinprov/layout"
)

// snapEntry is a row of the snapshot table as the tree holds it: the root is known
// by its pointer only once it has been written.
type snapEntry struct {
	layout.Snapshot
	root mapTree
}

// Key is the snapshot's epoch.
func (e snapEntry) Key() uint64 { return e.Epoch }

// End is the next epoch.
func (e snapEntry) End() uint64 { return e.Epoch + 1 }

var slabKind = cowtree.Kind[layout.Slab]{
	ID: layout.TreeSlabs, Bytes: layout.SlabEntryBytes,
	Put: func(b []byte, e layout.Slab) { e.Put(b) },
	Get: layout.GetSlab,
}

var snapKind = cowtree.Kind[snapEntry]{
	ID: layout.TreeSnapshots, Bytes: layout.SnapshotBytes,
	Put: func(b []byte, e snapEntry) {
		e.Root = e.root.Pointer()
		e.Put(b)
	},
	Get: func(b []byte) (snapEntry, error) {
		s, err := layout.GetSnapshot(b)
		return snapEntry{Snapshot: s, root: cowtree.FromPointer[layout.Extent](s.Root)}, err
	},
}

// frozen is the state of the disk at one moment, as a checkpoint writes it.
type frozen struct {
	header layout.Header
	gen    uint64 // nodes of this generation are new
	head   mapTree
	snaps  []mapTree
	slabs  cowtree.Tree[layout.Slab]
	table  cowtree.Tree[snapEntry]
	frees  []run  // blocks of nodes that it replaces
	last   *batch // the log up to here; nil if it is durable already
	mark   logMark
	nodes  int
}

// runCheckpoint writes the state of the disk: new nodes, flush, header, flush (R14).
// Only one runs at a time. ErrNoSpace leaves the disk as it was; any other failure
// is for good.
func (d *Disk) runCheckpoint(ctx context.Context, flags layout.HeaderFlags) error {
	var f frozen
	for {
		d.mu.Lock()
		var short int
		err := d.failed
		if err == nil {
			f, short = d.freezeLocked(flags)
			err = d.failed
		}
		d.mu.Unlock()
		if err != nil {
			return err
		}
		if short == 0 {
			break
		}
		if err := d.growTree(ctx, short, PurposeMetadata); err != nil {
			return fmt.Errorf("thinprov: checkpoint: %w", err)
		}
	}
	// A frozen state must reach its end, or the disk has failed.
	if err := d.writeFrozen(&f); err != nil {
		return d.fail(fmt.Errorf("checkpoint: %w", err))
	}
	return nil
}

func (d *Disk) writeFrozen(f *frozen) error {
	if err := d.writeNodes(f); err != nil {
		return err
	}
	d.unflushed.Store(true)
	if err := d.flushDevice(d.background); err != nil {
		return err
	}
	if f.last != nil {
		if err := d.settled(d.background, f.last); err != nil {
			return err
		}
		f.mark = f.last.mark
	}
	h := &f.header
	h.Map, h.Slabs, h.Snapshots = f.head.Pointer(), f.slabs.Pointer(), f.table.Pointer()
	h.LogOff, h.LogSeq, h.LogPrev = f.mark.pos%d.ring.size(), f.mark.seq, f.mark.prev
	h.EncodeInto(d.seed.Volume, d.header)
	if err := d.writeHeader(); err != nil {
		return err
	}
	d.unflushed.Store(true)
	if err := d.flushDevice(d.background); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.checkpoint = h.Checkpoint
	d.ring.keep, d.ring.frozen = d.ring.frozen, f.mark.pos
	d.retireLocked(d.nodeWaits)
	d.nodeWaits = f.frees
	return nil
}

// writeHeader keeps header writes apart from claims and releases; see Store.
func (d *Disk) writeHeader() error {
	done, err := d.takeClaiming(d.background)
	if err != nil {
		return err
	}
	defer done()
	return d.store.WriteHeader(d.background, d.header)
}

// freezeLocked fixes the state that a checkpoint writes, and gives all new nodes
// their addresses. If free blocks are lacking it changes nothing and returns how
// many.
func (d *Disk) freezeLocked(flags layout.HeaderFlags) (frozen, int) {
	var placed []func() // undo
	made := 0
	roots := []mapTree{d.head}
	for _, s := range d.snaps {
		roots = append(roots, s.root)
	}
	d.syncSnapshots()
	for again := true; again; again = len(d.alloc.dirty) > 0 {
		d.syncSlabs()
		for _, t := range roots {
			made += placeMade(d, t, &placed)
		}
		made += placeMade(d, d.snapTree, &placed) + placeMade(d, d.slabTree, &placed)
		if short := made - len(placed); short > 0 {
			for _, undo := range placed {
				undo()
			}
			return frozen{}, short
		}
	}
	last := d.sealLocked()
	f := frozen{
		header: d.headerLocked(flags), gen: d.gen,
		head: d.head, snaps: roots[1:], slabs: d.slabTree, table: d.snapTree,
		frees: d.nodeFrees, last: last, mark: d.ring.end, nodes: made,
	}
	d.nodeFrees, d.made = nil, 0
	d.gen++
	return f, 0
}

// placeMade gives addresses to the nodes of t that have none, and returns how many
// there were.
func placeMade[E cowtree.Entry](d *Disk, t cowtree.Tree[E], placed *[]func()) int {
	n := 0
	t.Made(d.gen, func(node *cowtree.Node[E]) {
		if node.Block() != 0 {
			return
		}
		n++
		blk := d.alloc.treeBlock()
		if blk == 0 {
			return
		}
		node.Place(blk)
		*placed = append(*placed, func() {
			d.alloc.takeBack(blk)
			node.Place(0)
		})
	})
	return n
}

// syncSnapshots brings the snapshot table up to date.
func (d *Disk) syncSnapshots() {
	for _, epoch := range slices.Sorted(maps.Keys(d.staleSnaps)) {
		s := d.snapByEpoch(epoch)
		if s == nil && d.snapTree.Root() == nil {
			continue
		}
		d.snapTree.Edit(&snapKind, d.tableEditor(), epoch, epoch+1, func(leaf []snapEntry, _, _ uint64) []snapEntry {
			if s == nil {
				return setEntry(leaf, epoch, nil)
			}
			return setEntry(leaf, epoch, &snapEntry{Snapshot: s.Snapshot, root: s.root})
		})
	}
	clear(d.staleSnaps)
}

// syncSlabs brings the slab table up to date.
func (d *Disk) syncSlabs() {
	dirty := d.alloc.dirty
	d.alloc.dirty = make(map[uint64]bool)
	for _, num := range slices.Sorted(maps.Keys(dirty)) {
		s := d.alloc.slabs[num]
		if s == nil && d.slabTree.Root() == nil {
			continue
		}
		d.slabTree.Edit(&slabKind, d.tableEditor(), num, num+1, func(leaf []layout.Slab, _, _ uint64) []layout.Slab {
			if s == nil {
				return setEntry(leaf, num, nil)
			}
			return setEntry(leaf, num, &layout.Slab{Number: num, Kind: s.kind, Used: s.used})
		})
	}
}

// setEntry puts e into a leaf in place of the entry of the key, or removes that.
func setEntry[E cowtree.Entry](leaf []E, key uint64, e *E) []E {
	i := 0
	for i < len(leaf) && leaf[i].Key() < key {
		i++
	}
	j := i
	if j < len(leaf) && leaf[j].Key() == key {
		j++
	}
	out := append([]E{}, leaf[:i]...)
	if e != nil {
		out = append(out, *e)
	}
	return append(out, leaf[j:]...)
}

func (d *Disk) headerLocked(flags layout.HeaderFlags) layout.Header {
	h := layout.Header{
		UUID: d.uuid, SizeBytes: d.size, Epoch: d.epoch, Parent: d.parent,
		Checkpoint: d.checkpoint + 1, LockGen: d.lockGen, Flags: flags,
		Self: d.seed.Owner, Origin: d.origin, OriginEpoch: d.originEpoch, Created: d.created,
		Mapped: d.mapped, Own: d.own, BootID: d.bootID, Ring: d.ring.slabs, Releasing: d.releasing,
	}
	if d.claim != nil {
		h.ClaimKind, h.ClaimUnits = d.claim.kind, d.claim.units
	}
	return h
}

// nodeWriteBytes is the longest run of nodes written at once.
const nodeWriteBytes = 256 << 10

// nodeWriter gathers encoded nodes that are neighbours on media.
type nodeWriter struct {
	d     *Disk
	first uint64 // block of buf
	buf   []byte
	err   error
}

func (w *nodeWriter) flush() {
	if w.err == nil && len(w.buf) > 0 {
		w.err = w.d.store.WriteAt(w.d.background, w.buf, int64(w.first)*BlockBytes)
	}
	w.buf = w.buf[:0]
}

// slot is where the node of a block is to be encoded.
func (w *nodeWriter) slot(blk uint64) []byte {
	if len(w.buf) == nodeWriteBytes || w.first+uint64(len(w.buf))/BlockBytes != blk {
		w.flush()
		w.first = blk
	}
	w.buf = w.buf[:len(w.buf)+BlockBytes]
	return w.buf[len(w.buf)-BlockBytes:]
}

// writeNodes encodes the new nodes, children first, and writes them.
func (d *Disk) writeNodes(f *frozen) error {
	w := nodeWriter{d: d, buf: block.AlignedBuffer(min(nodeWriteBytes, (f.nodes+1)*BlockBytes))[:0]}
	seq := f.header.Checkpoint
	encodeMade(&w, f.head, &mapKind, f.gen, seq)
	for _, t := range f.snaps {
		encodeMade(&w, t, &mapKind, f.gen, seq)
	}
	encodeMade(&w, f.table, &snapKind, f.gen, seq)
	encodeMade(&w, f.slabs, &slabKind, f.gen, seq)
	w.flush()
	return w.err
}

func encodeMade[E cowtree.Entry](w *nodeWriter, t cowtree.Tree[E], kind *cowtree.Kind[E], gen, seq uint64) {
	t.Made(gen, func(n *cowtree.Node[E]) {
		if p := n.Pointer(); p.Seq != seq || p.LockGen != w.d.lockGen { // not yet, as part of another tree
			n.Encode(kind, w.d.seed, w.d.lockGen, seq, w.slot(p.Block))
		}
	})
}

// keeps does checkpoints as they are wanted, and gives empty slabs back, until stop.
func (d *Disk) keeps(stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		case <-d.keeperKick:
		}
		d.mu.Lock()
		wanted, failed := d.checkpointsWanted, d.failed != nil
		due := wanted > d.checkpointsDone
		d.mu.Unlock()
		if failed {
			continue
		}
		if due {
			err := d.runCheckpoint(d.background, 0)
			d.mu.Lock()
			d.checkpointsDone, d.checkpointErr = wanted, err
			d.notifyLocked()
			d.mu.Unlock()
		}
		if err := d.releaseEmpty(d.background); err != nil && !errors.Is(err, ErrFailed) {
			d.logger.Warn("empty slabs stay until the disk is opened anew", "disk", fmt.Sprintf("%x", d.uuid), "cause", err)
		}
	}
}

func (d *Disk) wantCheckpointLocked() uint64 {
	if d.checkpointsWanted == d.checkpointsDone {
		d.checkpointsWanted++
	}
	wake(d.keeperKick)
	return d.checkpointsWanted
}

func (d *Disk) notifyLocked() {
	close(d.changed)
	d.changed = make(chan struct{})
}

// awaitCheckpoint waits for a checkpoint that begins no earlier than now.
func (d *Disk) awaitCheckpoint(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.checkpointsWanted++
	wanted := d.checkpointsWanted
	wake(d.keeperKick)
	for d.checkpointsDone < wanted && d.failed == nil {
		changed := d.changed
		d.mu.Unlock()
		var err error
		select {
		case <-changed:
		case <-ctx.Done():
			err = ctx.Err()
		}
		d.mu.Lock()
		if err != nil {
			return err
		}
	}
	return firstOf(d.failed, d.checkpointErr)
}

// Checkpoint makes the trees on media current, so that the next Open has nothing to
// replay.
func (d *Disk) Checkpoint(ctx context.Context) error {
	if err := d.begin(true); err != nil {
		return err
	}
	defer d.end()
	return d.awaitCheckpoint(ctx)
}
