package thinprov

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"basalt/internal/clock"
	"basalt/thinprov/cowtree"
	"basalt/thinprov/layout"
)

// Options are plain settings of an open disk.
type Options struct {
	BootID [16]byte // of this host's boot; zero if it is not known
}

// Disk is an open thin disk. Its methods may be called at once from several
// goroutines.
type Disk struct {
	store      Store
	clk        clock.Clock
	logger     *slog.Logger
	seed       layout.Seed
	lockGen    uint64
	readOnly   bool
	bootID     [16]byte
	background context.Context // of work that does not end with its request
	commitKick chan struct{}
	keeperKick chan struct{}
	commitStop chan struct{}
	keeperStop chan struct{}
	committer  sync.WaitGroup
	keeper     sync.WaitGroup
	flushTurn  chan struct{} // full while a flush is in progress
	claiming   chan struct{} // full while slabs are claimed or released
	deletion   chan struct{} // full while a snapshot is being deleted
	unflushed  atomic.Bool   // data was written since the last flush began
	caching    atomic.Int64  // writes into the device's cache that are in progress

	mu     sync.Mutex // guards everything below
	rd     reader
	failed error // not nil: every change is refused with it
	closed bool
	active int           // requests in progress
	idle   chan struct{} // closed by the last request to end after closed; see Close

	uuid                               [16]byte
	size                               int64
	created                            int64
	origin                             Ref
	originEpoch                        uint64
	head                               mapTree
	epoch                              uint64 // of the head
	parent                             uint64 // epoch of the head's parent snapshot, 0 if none
	mapped, own                        uint64 // blocks of the head; own are those not foreign
	snaps                              []*snapshot
	staleSnaps                         map[uint64]bool // epochs whose entry in the snapshot table is stale
	deleting                           *snapshot
	alloc                              *allocator
	retiring                           []retired
	ranges                             rangeLock
	near                               []layout.Extent // scratch of planLocked
	doubtful                           map[uint64]bool // parts of partBlocks in which a write in place failed; see moveDoubtful
	slabTree                           cowtree.Tree[layout.Slab]
	snapTree                           cowtree.Tree[snapEntry]
	gen                                uint64 // of tree nodes made since the last freeze
	made                               uint64 // how many there are, about
	promisedNodes                      uint64 // how many the writes in progress may make
	nodeFrees                          []run  // blocks of nodes replaced since the last freeze
	nodeWaits                          []run  // those replaced by the newest checkpoint, reusable after the next
	checkpoint                         uint64 // sequence of the newest
	header                             []byte // payload of the newest, for its reserved bytes
	clean                              bool   // the newest header says that the disk was closed in order
	ring                               ring
	open, writing                      *batch
	queue                              []*batch // sealed, not yet being written
	announced                          bool     // this opener has an entry in the log
	claim                              *claim   // of which the outcome is open
	releasing                          []uint64 // slabs that are on their way back
	checkpointsWanted, checkpointsDone uint64
	checkpointErr                      error         // of the last one
	changed                            chan struct{} // closed, and replaced, when a checkpoint ends or the disk fails
}

// claim is an intent to claim slabs.
type claim struct {
	kind  layout.SlabKind
	units []uint32
}

func newDisk(ctx context.Context, store Store, clk clock.Clock, logger *slog.Logger, opts Options) *Disk {
	d := &Disk{
		store: store, clk: clk, logger: logger, bootID: opts.BootID,
		seed:    layout.Seed{Volume: store.Volume(), Owner: store.Self()},
		lockGen: store.LockGeneration(), readOnly: store.LockGeneration() == 0,
		background: context.WithoutCancel(ctx),
		commitKick: make(chan struct{}, 1), keeperKick: make(chan struct{}, 1),
		commitStop: make(chan struct{}), keeperStop: make(chan struct{}),
		flushTurn: make(chan struct{}, 1), claiming: make(chan struct{}, 1), deletion: make(chan struct{}, 1),
		staleSnaps: make(map[uint64]bool), doubtful: make(map[uint64]bool), alloc: newAllocator(), gen: 1,
		header: make([]byte, layout.HeaderBytes), changed: make(chan struct{}),
	}
	d.rd = reader{store: store, seed: d.seed, mu: &d.mu, ended: d.drainLocked}
	return d
}

// Open opens the disk of the store. With a lock generation it replays the log,
// settles open claims and releases, and after an unclean end does a checkpoint,
// before it returns. Without one, nothing is written: the disk can be looked at, and
// may change under the feet of a reader that holds no lock.
//
// ctx bounds only the opening.
func Open(ctx context.Context, store Store, clk clock.Clock, logger *slog.Logger, opts Options) (*Disk, error) {
	d := newDisk(ctx, store, clk, logger, opts)
	replayed, err := d.recover(ctx)
	if err != nil {
		return nil, fmt.Errorf("thinprov: open disk: %w", err)
	}
	if d.readOnly {
		return d, nil
	}
	d.committer.Go(func() { d.commits(d.commitStop) })
	if err := d.resume(ctx, replayed); err != nil {
		close(d.commitStop)
		d.committer.Wait()
		return nil, fmt.Errorf("thinprov: open disk: %w", err)
	}
	d.keeper.Go(func() { d.keeps(d.keeperStop) })
	return d, nil
}

// resume ends what the last opener left half done.
func (d *Disk) resume(ctx context.Context, replayed int) error {
	// Whatever was read may still be in the device's volatile cache. Nothing may be
	// built on it before it is durable.
	d.unflushed.Store(true)
	if err := d.flushDevice(ctx); err != nil {
		return err
	}
	if err := d.settleClaim(ctx); err != nil {
		return fmt.Errorf("settle an open claim: %w", err)
	}
	if err := d.finishRelease(ctx); err != nil {
		return fmt.Errorf("finish an open release: %w", err)
	}
	if replayed == 0 && d.clean {
		return nil
	}
	err := d.runCheckpoint(ctx, 0)
	if errors.Is(err, ErrNoSpace) {
		d.logger.Warn("no space for a checkpoint at open", "disk", fmt.Sprintf("%x", d.uuid))
		return nil // the log holds everything; discards can make room
	}
	return err
}

// begin admits a request, end lets it go.
func (d *Disk) begin(change bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.closed:
		return ErrClosed
	case change && d.readOnly:
		return ErrReadOnly
	case change && d.failed != nil:
		return d.failed
	}
	d.active++
	return nil
}

func (d *Disk) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.endLocked()
}

func (d *Disk) endLocked() {
	d.active--
	if d.active == 0 && d.idle != nil {
		close(d.idle)
		d.idle = nil
	}
}

// Close waits for the requests in progress, checkpoints, and ends the disk's
// background work. Later requests get ErrClosed. The disk is closed even if an error
// is returned; what it acknowledged as durable is safe, and the next Open replays it.
func (d *Disk) Close(ctx context.Context) error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return ErrClosed
	}
	d.closed = true
	var idle chan struct{}
	if d.active > 0 {
		idle = make(chan struct{})
		d.idle = idle
	}
	d.mu.Unlock()
	if idle != nil {
		<-idle
	}
	if d.readOnly {
		return nil
	}
	close(d.keeperStop)
	d.keeper.Wait()
	err := d.failure()
	if err == nil {
		err = d.flushDevice(ctx)
	}
	if err == nil {
		err = d.runCheckpoint(ctx, layout.HeaderClean)
	}
	close(d.commitStop)
	d.committer.Wait()
	if err != nil {
		return fmt.Errorf("thinprov: close disk: %w", err)
	}
	return nil
}

// SizeBytes is the disk's logical size.
func (d *Disk) SizeBytes() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.size
}

// UUID is the disk's identity.
func (d *Disk) UUID() [16]byte { return d.uuid }

func (d *Disk) headTree() (mapTree, error) { return d.head, nil }

// ReadAt fills p from offBytes. Holes read as zeros.
func (d *Disk) ReadAt(ctx context.Context, p []byte, offBytes int64) error {
	if err := d.begin(false); err != nil {
		return err
	}
	defer d.end()
	if err := checkRange(d.SizeBytes(), offBytes, int64(len(p))); err != nil || len(p) == 0 {
		return err
	}
	return d.rd.readAt(ctx, d.headTree, p, offBytes)
}

// Map tells how a range is mapped, in ascending runs, until emit returns false.
func (d *Disk) Map(ctx context.Context, offBytes, lenBytes int64, emit func(Run) bool) error {
	if err := d.begin(false); err != nil {
		return err
	}
	defer d.end()
	if err := checkRange(d.SizeBytes(), offBytes, lenBytes); err != nil || lenBytes == 0 {
		return err
	}
	return d.rd.runs(ctx, d.headTree, offBytes, lenBytes, emit)
}

// Flush makes durable whatever reads showed before the call: all writes that ended,
// and what has taken effect of others.
func (d *Disk) Flush(ctx context.Context) error {
	if err := d.begin(true); err != nil {
		return err
	}
	defer d.end()
	// A mapping is visible before its record is durable.
	if b := d.lastBatch(); b != nil {
		if err := d.settled(ctx, b); err != nil {
			return err
		}
	}
	return d.flushDevice(ctx)
}
