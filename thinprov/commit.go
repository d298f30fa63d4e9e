package thinprov

import (
	"context"
	"errors"
	"fmt"

	"basalt/block"
	"basalt/thinprov/layout"
)

// batch is what one log write, or a few, make durable together.
type batch struct {
	buf      []byte       // entries
	ends     []int        // in buf, of each entry
	promised uint64       // bytes of the ring set aside for it
	frees    []run        // data blocks that its entries free
	ranges   []*heldRange // held until it is durable
	done     chan struct{}
	err      error   // valid when done is closed
	mark     logMark // the log behind it; valid when done is closed without an error
}

// logMark is a place between two records of the log.
type logMark struct {
	pos  uint64 // absolute: pos % ring.size() is the offset in the ring
	seq  uint64 // of the record behind the mark
	prev uint32 // CRC of the record before the mark
}

// ring is the disk's log. Positions only grow; see logMark.
type ring struct {
	slabs    []uint64
	end      logMark // behind the last durable record
	frozen   uint64  // where replay starts by the newest checkpoint
	keep     uint64  // where it starts by the checkpoint before, should the newest be lost
	promised uint64  // bytes set aside for entries that are not written yet
}

func (r *ring) size() uint64 { return uint64(len(r.slabs)) * SlabBytes }

// offset is the device's byte address of a position.
func (r *ring) offset(pos uint64) int64 {
	in := pos % r.size()
	return int64(r.slabs[in/SlabBytes]*SlabBytes + in%SlabBytes)
}

// ringReserve is kept for claims, so that a checkpoint never waits for the log.
const ringReserve = 128 << 10

// fits reports whether n more bytes can be promised.
func (r *ring) fits(n uint64) bool {
	return r.end.pos+r.promised+n+ringReserve <= r.keep+r.size()
}

// recordBytes is what a request with n bytes of entries may take in the ring.
func recordBytes(n int) uint64 {
	const room = BlockBytes - layout.RecordHeadBytes
	return uint64(n+room-1) / room * BlockBytes
}

// due reports that a third of the ring is used since the last checkpoint.
func (r *ring) due() bool { return r.end.pos-r.frozen >= r.size()/3 }

// appendLocked adds an entry to the batch that is written next. promised bytes of
// the ring were set aside for it, and pass to the batch.
func (d *Disk) appendLocked(e layout.Entry, promised uint64) *batch {
	b := d.open
	if b == nil {
		b = &batch{done: make(chan struct{})}
		d.open = b
	}
	if !d.announced {
		d.announced = true
		b.add(layout.Entry{Kind: layout.EntryOpen, UUID: d.bootID})
	}
	b.add(e)
	b.promised += promised
	return b
}

func (b *batch) add(e layout.Entry) {
	b.buf = e.Append(b.buf)
	b.ends = append(b.ends, len(b.buf))
}

// wake makes a goroutine of the disk look for work.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// settled waits until the batch is durable. If ctx ends first, the batch goes its
// way nevertheless.
func (d *Disk) settled(ctx context.Context, b *batch) error {
	wake(d.commitKick)
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// sealLocked ends the open batch and returns the last one that is on its way, nil if
// there is none.
func (d *Disk) sealLocked() *batch {
	if d.open != nil {
		d.queue = append(d.queue, d.open)
		d.open = nil
		wake(d.commitKick)
	}
	if n := len(d.queue); n > 0 {
		return d.queue[n-1]
	}
	return d.writing
}

// errRingFull: more was appended than was promised. A bug, but one that must not
// overwrite records that a replay may need.
var errRingFull = errors.New("the ring is full")

// commits writes batches, one at a time, until stop.
func (d *Disk) commits(stop <-chan struct{}) {
	for {
		d.mu.Lock()
		if len(d.queue) == 0 && d.open != nil {
			d.queue, d.open = append(d.queue, d.open), nil
		}
		if len(d.queue) > 0 {
			d.writing, d.queue = d.queue[0], d.queue[1:]
		}
		b := d.writing
		d.mu.Unlock()
		if b != nil {
			d.finishBatch(b, d.writeBatch(b))
			continue
		}
		select {
		case <-d.commitKick:
		case <-stop:
			return
		}
	}
}

// writeBatch flushes the data that the batch maps, then writes its records. Only the
// committer calls it, so that it owns ring.end.
func (d *Disk) writeBatch(b *batch) error {
	d.mu.Lock()
	err, mark := d.failed, d.ring.end
	d.mu.Unlock()
	if err != nil {
		return err
	}
	if err := d.flushDevice(d.background); err != nil {
		return err
	}
	for first := 0; first < len(b.ends); {
		first, mark, err = d.writeRecord(b, first, mark)
		if err != nil {
			return d.fail(fmt.Errorf("log: %w", err))
		}
	}
	b.mark = mark
	return nil
}

// writeRecord writes the entries of b from the given one on, as many as fit.
func (d *Disk) writeRecord(b *batch, first int, mark logMark) (int, logMark, error) {
	room := min(layout.MaxRecordBytes, SlabBytes-int(mark.pos%SlabBytes)) - layout.RecordHeadBytes
	from, next := 0, first
	if first > 0 {
		from = b.ends[first-1]
	}
	for next < len(b.ends) && b.ends[next]-from <= room {
		next++
	}
	used := b.ends[next-1] - from
	rec := block.AlignedBuffer((used + layout.RecordHeadBytes + BlockBytes - 1) / BlockBytes * BlockBytes)
	copy(rec[layout.RecordHeadBytes:], b.buf[from:from+used])
	at := d.ring.offset(mark.pos)
	crc := d.seed.SealRecord(rec, at, layout.RecordHead{LockGen: d.lockGen, Seq: mark.seq, Prev: mark.prev, Used: used})
	d.mu.Lock()
	limit := d.ring.keep + d.ring.size()
	d.mu.Unlock()
	if mark.pos+uint64(len(rec)) > limit {
		return 0, logMark{}, errRingFull
	}
	if err := d.store.WriteFUA(d.background, rec, at); err != nil {
		return 0, logMark{}, err
	}
	return next, logMark{pos: mark.pos + uint64(len(rec)), seq: mark.seq + 1, prev: crc}, nil
}

// finishBatch tells the waiting, and lets ranges and freed blocks go.
func (d *Disk) finishBatch(b *batch, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	b.err = err
	d.writing = nil
	d.ring.promised -= b.promised
	for _, h := range b.ranges {
		d.ranges.release(h)
	}
	if err == nil {
		d.ring.end = b.mark
		d.retireLocked(b.frees)
		if d.ring.due() {
			d.wantCheckpointLocked()
		}
	}
	close(b.done)
}

// retired are freed blocks that are reusable once the I/O of a phase has ended.
type retired struct {
	phase uint64
	runs  []run
}

// retireLocked makes blocks reusable as soon as all I/O begun by now has ended. That
// they are free is durable.
func (d *Disk) retireLocked(runs []run) {
	if len(runs) > 0 {
		d.retiring = append(d.retiring, retired{d.rd.pins.bump(), runs})
	}
	d.drainLocked()
}

// drainLocked lets retired blocks go whose I/O has ended.
func (d *Disk) drainLocked() {
	for len(d.retiring) > 0 && d.retiring[0].phase < d.rd.pins.oldest() {
		for _, r := range d.retiring[0].runs {
			d.alloc.letGo(r)
		}
		d.retiring = d.retiring[1:]
		if d.emptySlabsLocked() > d.spareLocked() {
			wake(d.keeperKick)
		}
	}
}

// flushDevice makes all data durable that was written, or could be read, before the
// call. A flush that
// another caller began later than that write serves as well.
func (d *Disk) flushDevice(ctx context.Context) error {
	select {
	case d.flushTurn <- struct{}{}:
		defer func() { <-d.flushTurn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := d.failure(); err != nil {
		return err
	}
	// A write in progress may have been read already, and is noted only when it ends.
	busy := d.caching.Load() > 0
	if !d.unflushed.Swap(false) && !busy {
		return nil
	}
	if err := d.store.Flush(d.background); err != nil {
		return d.fail(fmt.Errorf("flush: %w", err))
	}
	return nil
}

// fail makes the disk refuse all changes from now on, and returns the error that
// says so.
func (d *Disk) fail(cause error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.failLocked(cause)
}

func (d *Disk) failLocked(cause error) error {
	if d.failed == nil {
		d.failed = fmt.Errorf("%w: %w", ErrFailed, cause)
		d.logger.Error("thin disk failed", "disk", fmt.Sprintf("%x", d.uuid), "cause", cause)
		d.notifyLocked()
	}
	return d.failed
}

func (d *Disk) failure() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.failed
}
