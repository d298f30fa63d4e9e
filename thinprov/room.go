package thinprov

import (
	"context"
	"errors"

	"basalt/thinprov/cowtree"
	"basalt/thinprov/layout"
)

// lack is what a request is short of.
type lack uint8

const (
	lackNothing lack = iota
	lackBlocks       // a slab for data
	lackNodes        // free blocks for tree nodes
	lackLog          // room in the ring
)

// rank orders changes by how much room they leave to others for tree nodes, so that
// on a volume without any space discards can still be done after writes, and
// deletions of snapshots, which alone give nodes back, after discards.
type rank uint8

const (
	rankWrite  rank = iota // allocates for data
	rankChange             // a discard, a snapshot: may make nodes, for as long as a snapshot keeps the old ones
	rankFree               // a step of a deletion, a release: changes the tables only
)

// purpose is what slabs are claimed for when a change of the rank lacks nodes.
func (k rank) purpose() Purpose {
	if k == rankWrite {
		return PurposeData
	}
	return PurposeMetadata
}

// Free tree blocks that changes leave alone, besides what the next checkpoint needs
// for the tables. A change of the lowest rank may touch stepTables leaves of the
// slab table, and their old blocks come back only two checkpoints later.
const (
	nodesForWrite  = 160
	nodesForChange = 96
	nodesForFree   = stepTables + 8
	stepTables     = 32
)

// nodesPerPart are the nodes that mapping one part of a write may make, besides the
// leaves of the slab table.
const nodesPerPart = 16

// missingLocked tells what a change of the trees that logs up to n bytes lacks.
func (d *Disk) missingLocked(n uint64, k rank) lack {
	keep, again := d.closureNodes(), uint64(nodesForFree)
	switch k {
	case rankWrite:
		again = nodesForWrite + keep
	case rankChange:
		again = nodesForChange + keep
	}
	switch {
	case !d.ring.fits(n):
		return lackLog
	case d.alloc.freeTree < d.made+d.promisedNodes+d.tableNodes()+again:
		return lackNodes
	}
	return lackNothing
}

// slabLeaves bounds how many leaves of the slab table the entries of n slabs are in:
// two neighbours hold more than half of what one may hold.
func (d *Disk) slabLeaves(n int) uint64 {
	const perLeaf = layout.NodeRoom / layout.SlabEntryBytes
	return min(uint64(n), uint64(len(d.alloc.slabs))/(perLeaf/4)+1)
}

// closureNodes is how many leaves of the slab table a checkpoint may have to write
// because it gives blocks of tree slabs to nodes, and takes others back.
func (d *Disk) closureNodes() uint64 { return d.slabLeaves(len(d.alloc.tree)) }

// tableNodes bounds the nodes of the tables that the next checkpoint writes.
func (d *Disk) tableNodes() uint64 {
	leaves := d.slabLeaves(len(d.alloc.dirty)+len(d.alloc.tree)) + uint64(len(d.staleSnaps))
	return leaves + leaves/16 + 4 // and those above them
}

// provide makes room for what is missing.
func (d *Disk) provide(ctx context.Context, missing lack, k rank) error {
	if missing == lackLog {
		return d.awaitCheckpoint(ctx)
	}
	err := d.growTree(ctx, 1, k.purpose())
	if !errors.Is(err, ErrNoSpace) {
		return err
	}
	// Two checkpoints set free whatever nodes have been replaced.
	for range 2 {
		if err := d.awaitCheckpoint(ctx); err != nil {
			return err
		}
		d.mu.Lock()
		missing := d.missingLocked(0, k)
		d.mu.Unlock()
		if missing == lackNothing {
			return nil
		}
	}
	return err
}

// tally counts the leaves of the slab table in which blocks lie.
type tally struct {
	table  cowtree.Tree[layout.Slab]
	slab   uint64 // counted last
	leaves map[*cowtree.Node[layout.Slab]]bool
}

func (d *Disk) newTally() tally {
	return tally{table: d.slabTree, leaves: make(map[*cowtree.Node[layout.Slab]]bool)}
}

// add counts the slabs of a physical run.
func (t *tally) add(first, count uint64) {
	const per = layout.BlocksPerSlab
	for slab := first / per; slab <= (first+count-1)/per; slab++ {
		if slab != t.slab {
			t.slab = slab
			t.leaves[t.table.Leaf(slab)] = true
		}
	}
}

// full reports that a change should touch no more of the slab table.
func (t *tally) full() bool { return len(t.leaves) >= stepTables }
