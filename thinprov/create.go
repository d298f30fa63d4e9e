package thinprov

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"basalt/block"
	"basalt/internal/clock"
	"basalt/thinprov/cowtree"
	"basalt/thinprov/layout"
)

// CreateOptions are the properties of a new disk.
type CreateOptions struct {
	SizeBytes int64    // a multiple of 512, at most MaxSizeBytes; 0 for a clone: its origin's
	UUID      [16]byte // not zero
	LogBytes  int64    // a multiple of SlabBytes, 2 to 16 MiB; default 2 MiB
	BootID    [16]byte // of this host's boot; zero if it is not known
}

func (o *CreateOptions) validate() error {
	if o.LogBytes == 0 {
		o.LogBytes = layout.MinLogSlabs * SlabBytes
	}
	if o.UUID == ([16]byte{}) {
		return errors.New("thinprov: a disk needs a UUID")
	}
	if n := o.LogBytes / SlabBytes; o.LogBytes%SlabBytes != 0 || n < layout.MinLogSlabs || n > layout.MaxLogSlabs {
		return fmt.Errorf("thinprov: log of %d bytes", o.LogBytes)
	}
	return checkSize(o.SizeBytes)
}

func checkSize(n int64) error {
	if n <= 0 || n > MaxSizeBytes || n%SectorBytes != 0 {
		return fmt.Errorf("thinprov: size of %d bytes is not a multiple of 512 up to 62 TiB", n)
	}
	return nil
}

// Create makes the object of the store an empty disk. If it fails, slabs may have
// been claimed; Slabs finds them, by the header or in the claim that it names.
func Create(ctx context.Context, store Store, clk clock.Clock, opts CreateOptions) error {
	if err := opts.validate(); err != nil {
		return err
	}
	d := newDisk(ctx, store, clk, slog.New(slog.DiscardHandler), Options{BootID: opts.BootID})
	d.epoch = 1
	return d.create(ctx, opts)
}

// CreateClone makes the object of the store a disk that begins with the content of a
// published snapshot; published is the header payload of that snapshot's object,
// origin. The caller has made the clone count there, so that it stays.
func CreateClone(ctx context.Context, store Store, clk clock.Clock, published []byte, origin Ref, opts CreateOptions) error {
	p, err := layout.DecodePublished(store.Volume(), published)
	if err != nil {
		return fmt.Errorf("thinprov: clone: %w", err)
	}
	if opts.SizeBytes == 0 {
		opts.SizeBytes = p.SizeBytes
	}
	if opts.SizeBytes < p.SizeBytes {
		return fmt.Errorf("thinprov: clone of %d bytes: %w", opts.SizeBytes, ErrShrink)
	}
	if err := opts.validate(); err != nil {
		return err
	}
	d := newDisk(ctx, store, clk, slog.New(slog.DiscardHandler), Options{BootID: opts.BootID})
	p.Root.Foreign = true
	d.head = cowtree.FromPointer[layout.Extent](p.Root)
	d.mapped = p.Mapped
	d.epoch, d.origin, d.originEpoch = p.Epoch+1, origin, p.Epoch
	return d.create(ctx, opts)
}

// create claims the first slabs, with the intent in the header, zeroes the log, and
// writes the first checkpoint. Once begun it is not cancelled: a write that is left
// behind may land when the slab is another's.
func (d *Disk) create(ctx context.Context, opts CreateOptions) error {
	if d.readOnly {
		return ErrReadOnly
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	d.uuid, d.size, d.created = opts.UUID, opts.SizeBytes, d.clk.Wall().UnixNano()
	logSlabs := int(opts.LogBytes / SlabBytes)
	for len(d.ring.slabs) < logSlabs {
		got, err := d.claimFirst(ctx, layout.SlabLog, logSlabs-len(d.ring.slabs))
		if err != nil {
			return err
		}
		d.ring.slabs = append(d.ring.slabs, got...)
	}
	if _, err := d.claimFirst(ctx, layout.SlabTree, 1); err != nil {
		return err
	}
	zeros := block.AlignedBuffer(SlabBytes)
	for _, num := range d.ring.slabs {
		if err := d.store.WriteAt(ctx, zeros, int64(num)*SlabBytes); err != nil {
			return fmt.Errorf("thinprov: create: zero the log: %w", err)
		}
	}
	d.ring.end.seq = 1
	d.unflushed.Store(true)
	if err := d.flushDevice(ctx); err != nil {
		return fmt.Errorf("thinprov: create: %w", err)
	}
	if err := d.runCheckpoint(ctx, layout.HeaderClean); err != nil {
		return fmt.Errorf("thinprov: create: %w", err)
	}
	return nil
}

// claimFirst claims slabs before there is a log: the header holds the intent.
func (d *Disk) claimFirst(ctx context.Context, kind layout.SlabKind, n int) ([]uint64, error) {
	plan, err := d.store.PlanClaim(ctx, n, PurposeData)
	if err != nil {
		return nil, fmt.Errorf("thinprov: create: claim a slab: %w", err)
	}
	d.claim = &claim{kind: kind, units: plan.Units}
	h := d.headerLocked(0)
	h.EncodeInto(d.seed.Volume, d.header)
	if err := d.store.WriteHeader(ctx, d.header); err != nil {
		return nil, fmt.Errorf("thinprov: create: %w", err)
	}
	slabs, err := d.store.Claim(ctx, plan)
	if err != nil {
		return nil, fmt.Errorf("thinprov: create: claim a slab: %w", err)
	}
	d.claim = nil
	slices.Sort(slabs)
	var got []uint64
	for _, at := range slabs {
		s := &slab{num: uint64(at) / SlabBytes, kind: kind}
		if kind == layout.SlabLog {
			s.used.set(0, layout.BlocksPerSlab)
		}
		if err := d.alloc.add(s); err != nil {
			return nil, err
		}
		d.alloc.markDirty(s)
		got = append(got, s.num)
	}
	return got, nil
}

// Slabs lists all slabs that the store's object holds, in the order in which a
// deletion gives them back: data, then tree, then log. It changes nothing but what
// Settle does for an open claim or release.
func Slabs(ctx context.Context, store Store) ([]int64, error) {
	payload, err := store.ReadHeader(ctx)
	if err != nil {
		return nil, err
	}
	h, err := layout.DecodeHeader(store.Volume(), payload)
	if err != nil {
		return nil, err
	}
	var units []uint32
	slabs := make([][]int64, layout.SlabLog+1)
	known := make(map[int64]bool)
	add := func(at int64, kind layout.SlabKind) {
		if !known[at] {
			known[at] = true
			slabs[kind] = append(slabs[kind], at)
		}
	}
	if len(h.Ring) >= layout.MinLogSlabs && !h.Slabs.IsNil() {
		d := newDisk(ctx, store, clock.System{}, slog.New(slog.DiscardHandler), Options{})
		d.readOnly = true
		if _, err := d.recover(ctx); err != nil {
			return nil, fmt.Errorf("thinprov: list slabs: %w", err)
		}
		for _, num := range sortedSlabs(d.alloc) {
			add(int64(num)*SlabBytes, d.alloc.slabs[num].kind)
		}
		if d.claim != nil {
			units = append(units, d.claim.units...)
		}
		for _, num := range d.releasing {
			units = append(units, store.Unit(int64(num)*SlabBytes))
		}
	} else {
		for _, num := range h.Ring {
			add(int64(num)*SlabBytes, layout.SlabLog)
		}
		units = h.ClaimUnits
	}
	if len(units) > 0 {
		slices.Sort(units)
		ours, err := store.Settle(ctx, slices.Compact(units))
		if err != nil {
			return nil, err
		}
		for _, at := range ours {
			add(at, layout.SlabData)
		}
	}
	return slices.Concat(slabs[layout.SlabData], slabs[layout.SlabTree], slabs[layout.SlabLog]), nil
}
