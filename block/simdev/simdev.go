// Package simdev simulates one LUN that several hosts share: a target with a
// volatile write cache, compare-and-write, fencing by registered keys, power
// failure, and hosts that freeze, die, or whose writes arrive late.
//
// Each host reaches the LUN through a Handle of its own (its nexus). Everything
// random comes from the caller's generator or from Options.Seed; the package
// starts no goroutine and reads no clock, so a stepped caller gets the same run
// for the same seed.
//
// It is not a SCSI target: it speaks block.Device, has no command set, no paths
// and no queue depth, and takes no time.
//
// Invariants:
//   - What the hosts see is the durable content with all cached changes applied in
//     order.
//   - A change refused by the fence, by death or by a closed handle leaves no trace.
//   - Memory grows with the bytes written and not yet zeroed, not with SizeBytes;
//     the cache holds at most Options.CacheBytes, and writes the oldest back then.
//
// Lock order: LUN.mu is the only lock. It is not held while an operation waits,
// nor while the hook of OnChange runs.
package simdev

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"

	"basalt/block"
)

// ErrHostDead is what a killed host's own calls return. No one is left to read
// it; it ends the goroutines that played the host.
var ErrHostDead = errors.New("simdev: the host is dead")

// Options of New.
type Options struct {
	SizeBytes      int64  // multiple of 4096, up to 1 EiB; default 64 MiB
	LogicalBytes   int    // block, compare-and-write unit and tear unit, 512 or 4096; default 4096
	CacheBytes     int64  // bytes of changes that may be volatile at once; default 64 MiB
	Seed           uint64 // decides what discarded blocks read as
	DiscardGarbage bool   // discarded blocks read as garbage, else as zeros
}

func (o Options) withDefaults() Options {
	if o.SizeBytes == 0 {
		o.SizeBytes = 64 << 20
	}
	if o.LogicalBytes == 0 {
		o.LogicalBytes = 4096
	}
	if o.CacheBytes == 0 {
		o.CacheBytes = 64 << 20
	}
	return o
}

func (o Options) validate() error {
	if o.SizeBytes < 0 || o.SizeBytes > 1<<60 || o.SizeBytes%pageBytes != 0 {
		return fmt.Errorf("simdev: SizeBytes is %d, not a multiple of %d up to 1 EiB", o.SizeBytes, pageBytes)
	}
	if o.LogicalBytes != 512 && o.LogicalBytes != 4096 {
		return fmt.Errorf("simdev: LogicalBytes is %d, not 512 or 4096", o.LogicalBytes)
	}
	if o.CacheBytes < 0 {
		return fmt.Errorf("simdev: CacheBytes is %d", o.CacheBytes)
	}
	return nil
}

// Stats counts operations that reached the LUN, refused ones excluded.
type Stats struct {
	Reads, Writes, FUAs, Flushes, Zeroes, Discards, CAWs int64
	Miscompares                                          int64 // of the CAWs
	ReadBytes                                            int64
	WrittenBytes                                         int64 // by Writes, FUAs and successful CAWs
}

// LUN is the simulated target.
type LUN struct {
	opts Options

	mu       sync.Mutex // guards all below, and the fields of every Handle
	size     int64
	visible  *store // what hosts read
	cache    cache  // the durable content and the changes on top of it
	changes  int    // operations other than reads that reached the LUN; also numbers discards
	handles  []*Handle
	stats    Stats
	onChange func(n int)
	moved    chan struct{} // closed and replaced when a waiting operation may go on
}

// New makes a LUN of zeros. It panics on options out of range, which only a test
// or a simulation can pass.
func New(opts Options) *LUN {
	opts = opts.withDefaults()
	if err := opts.validate(); err != nil {
		panic(err)
	}
	return &LUN{
		opts:    opts,
		size:    opts.SizeBytes,
		visible: newStore(),
		cache:   cache{durable: newStore(), limitBytes: opts.CacheBytes},
		moved:   make(chan struct{}),
	}
}

// Host opens the LUN for one host. The name appears in errors and stands for
// nothing else: each call is a new, unregistered nexus.
func (l *LUN) Host(name string) *Handle {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := &Handle{lun: l, name: name, stopAfter: -1}
	l.handles = append(l.handles, h)
	return h
}

// OnChange calls hook after each operation other than a read has reached the LUN,
// with the number of such operations so far, from 1. The hook runs in the
// goroutine of the operation and may use the LUN, CrashClone above all; nil
// removes it.
func (l *LUN) OnChange(hook func(n int)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.onChange = hook
}

// Stats returns the counts since the LUN was made or ResetStats.
func (l *LUN) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stats
}

// ResetStats zeroes the counts of the LUN and of its handles.
func (l *LUN) ResetStats() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stats = Stats{}
	for _, h := range l.handles {
		h.stats = Stats{}
	}
}

// Grow enlarges the LUN to sizeBytes, a multiple of 4096; the new part is zero.
func (l *LUN) Grow(sizeBytes int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if sizeBytes < l.size {
		return fmt.Errorf("simdev: cannot shrink from %d to %d bytes: %w", l.size, sizeBytes, block.ErrNotSupported)
	}
	opts := l.opts
	opts.SizeBytes = sizeBytes
	if err := opts.validate(); err != nil {
		return err
	}
	l.size = sizeBytes
	return nil
}

// Clone copies the LUN as it is, cached changes included, without its handles,
// keys, counts and hook.
func (l *LUN) Clone() *LUN {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := New(l.opts)
	c.size, c.changes = l.size, l.changes
	c.visible = l.visible.clone()
	c.cache = l.cache.clone()
	return c
}

// CrashClone returns the LUN as a power failure at this moment would leave it,
// and leaves the original as it is: durable content, plus a random choice of the
// cached changes, each perhaps torn at logical blocks.
func (l *LUN) CrashClone(rng *rand.Rand) *LUN {
	c := l.Clone()
	c.losePower(rng)
	return c
}

// Crash is a power failure of the target. All handles are dead (ErrClosed), what
// they had under way is lost, and their keys are gone with them; new handles see
// what CrashClone describes.
func (l *LUN) Crash(rng *rand.Rand) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range l.handles {
		h.endLocked(closed)
		h.key = nil
	}
	l.handles = nil
	l.losePower(rng)
	l.wakeLocked()
}

func (l *LUN) losePower(rng *rand.Rand) {
	l.cache.losePower(rng, int64(l.opts.LogicalBytes))
	l.visible = l.cache.durable.clone()
}

// wakeLocked lets waiting operations look again.
func (l *LUN) wakeLocked() {
	close(l.moved)
	l.moved = make(chan struct{})
}

func (l *LUN) geometryLocked() block.Geometry {
	return block.Geometry{
		SizeBytes:    l.size,
		LogicalBytes: l.opts.LogicalBytes,
		UnitBytes:    l.opts.LogicalBytes,
		DiscardBytes: int64(l.opts.LogicalBytes),
		SharedCAW:    true,
	}
}
