package vmfs

import (
	"context"
	"errors"
	"fmt"
	"time"

	"basalt/block"
	"basalt/block/unit"
	"basalt/internal/clock"
	"basalt/lease"
)

// FormatOptions are a new volume's settings.
type FormatOptions struct {
	Volume   [16]byte      // id; required
	Label    string        // at most MaxLabelBytes
	Lease    time.Duration // of its hosts; default lease.DefaultLease
	Nonce    func() uint64 // random numbers; default: the system's
	Progress func(doneBytes, allBytes int64)
}

// Format writes an empty volume onto dev, over anything that was there. The
// superblocks come last, so that a crash leaves no half a volume that mounts.
// Nobody may use dev meanwhile; see InUse.
func Format(ctx context.Context, dev block.Device, clk clock.Clock, opts FormatOptions) error {
	geo, err := geometryFor(dev.Geometry())
	if err != nil {
		return err
	}
	switch {
	case opts.Volume == [16]byte{}:
		return errors.New("vmfs: format: the volume id is zero")
	case len(opts.Label) > MaxLabelBytes:
		return fmt.Errorf("vmfs: label of %d bytes, at most %d are possible", len(opts.Label), MaxLabelBytes)
	}
	if opts.Lease == 0 {
		opts.Lease = lease.DefaultLease
	}
	if opts.Nonce == nil {
		opts.Nonce = randomNonce
	}
	sb := Superblock{
		Volume: opts.Volume, Sequence: 1, SizeBytes: geo.sizeBytes, UnitBytes: geo.unitBytes, Lease: opts.Lease,
		MiddleGroup: uint32(geo.groups() / 2), Created: clk.Wall(), Label: opts.Label,
	}
	f := formatter{ctx: ctx, dev: dev, sb: &sb, geo: geo, opts: opts}
	return f.run()
}

type formatter struct {
	ctx  context.Context
	dev  block.Device
	sb   *Superblock
	geo  geometry
	opts FormatOptions
}

func (f *formatter) run() error {
	steps := []func() error{f.wipe, f.regions, f.ownerTables, f.objects, f.superblocks}
	for _, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("vmfs: format: %w", err)
		}
		if err := f.dev.Flush(f.ctx); err != nil {
			return fmt.Errorf("vmfs: format: %w", err)
		}
	}
	return nil
}

// wipe removes the copies of an earlier volume's superblock.
func (f *formatter) wipe() error {
	zero := block.AlignedBuffer(SuperblockBytes)
	offs := []int64{SuperblockOff, f.geo.tailOff()}
	for g := range f.geo.groups() {
		offs = append(offs, groupOff(g)+MiddleOff)
	}
	for _, off := range offs {
		if err := f.dev.WriteAt(f.ctx, zero, off); err != nil {
			return err
		}
	}
	return nil
}

// regions writes registers, heartbeats, the volume unit and the scratch units.
func (f *formatter) regions() error {
	if err := lease.Format(f.ctx, f.dev, areaOf(f.sb)); err != nil {
		return err
	}
	if err := f.seal(unit.KindVolume, VolumeUnitOff, func(img []byte) {
		copy(img[unit.HeadBytes:], volumeRecord{TableGroups: 1}.encode(img))
	}); err != nil {
		return err
	}
	for i := range int64(ScratchUnits) {
		if err := f.seal(unit.KindScratch, ScratchOff+i*StrideBytes, func([]byte) {}); err != nil {
			return err
		}
	}
	return nil
}

func (f *formatter) seal(kind unit.Kind, off int64, fill func(img []byte)) error {
	img := block.AlignedBuffer(f.geo.unitBytes)
	fill(img)
	unit.Place{Volume: f.sb.Volume, OffBytes: off, Kind: kind}.Seal(img, unit.Head{Version: 1, Nonce: f.opts.Nonce()})
	return f.dev.WriteAt(f.ctx, img, off)
}

// ownerTables tags the head slab of every group and its part of the object table
// as the volume's own.
func (f *formatter) ownerTables() error {
	per := f.geo.unitsPerGroup()
	buf := block.AlignedBuffer(per * f.geo.unitBytes)
	for g := range f.geo.groups() {
		clear(buf)
		for i := range per {
			u := uint32(g)*uint32(per) + uint32(i)
			img := buf[i*f.geo.unitBytes : (i+1)*f.geo.unitBytes]
			first, end := f.geo.unitSlabs(u)
			for s := first; s < end; s++ {
				in := s % SlabsPerGroup
				if in == 0 || (f.geo.hasTable(g) && in <= TableSlabs) {
					setTag(img[unit.HeadBytes:], int(s-first), systemTag)
				}
			}
			unit.Place{Volume: f.sb.Volume, OffBytes: f.geo.unitOff(u), Kind: unit.KindOwnerTable}.Seal(img, unit.Head{Version: 1, Nonce: f.opts.Nonce()})
		}
		if err := f.dev.WriteAt(f.ctx, buf, groupOff(g)); err != nil {
			return err
		}
		if f.opts.Progress != nil {
			f.opts.Progress((g+1)*gib, f.geo.groups()*gib)
		}
	}
	return nil
}

// objects initialises the first group's part of the object table, with the volume
// object and the root folder.
func (f *formatter) objects() error {
	if err := initTablePart(f.ctx, f.dev, f.sb.Volume, f.geo, 0, f.opts.Nonce); err != nil {
		return err
	}
	empty := FolderContent{form: formInline}
	off := objectOff(rootSlot) + headerAOff
	h := Header{Sequence: 1, Self: rootRef, Kind: KindFolder, Created: f.sb.Created, Modified: f.sb.Created, Payload: empty.Encode()}
	b := block.AlignedBuffer(HeaderBytes)
	h.Encode(b, f.sb.Volume, off)
	if err := f.dev.WriteAt(f.ctx, b, off); err != nil {
		return err
	}
	for slot, id := range []Identity{
		volumeSlot: {State: StateLive, Kind: KindVolume, Incarnation: 1},
		rootSlot:   {State: StateLive, Kind: KindFolder, Incarnation: 1},
	} {
		if err := f.seal(unit.KindIdentity, objectOff(uint32(slot))+identityOff, func(img []byte) {
			copy(img[unit.HeadBytes:], id.Encode(img))
		}); err != nil {
			return err
		}
	}
	return nil
}

func (f *formatter) superblocks() error {
	for _, off := range f.sb.copies() {
		b := block.AlignedBuffer(SuperblockBytes)
		f.sb.Encode(b, off)
		if err := f.dev.WriteFUA(f.ctx, b, off); err != nil {
			return err
		}
	}
	return nil
}

// copies are the places of the superblock's three copies.
func (s *Superblock) copies() []int64 {
	return []int64{SuperblockOff, groupOff(int64(s.MiddleGroup)) + MiddleOff, s.geometry().tailOff()}
}

// initTablePart makes a group's part of the object table: all slots FREE and
// unlocked. It is durable when it returns nil.
func initTablePart(ctx context.Context, dev block.Device, volume [16]byte, geo geometry, group uint32, nonce func() uint64) error {
	if err := dev.WriteZeroes(ctx, groupOff(int64(group))+SlabBytes, TableSlabs*SlabBytes); err != nil {
		return err
	}
	units := block.AlignedBuffer(identityOff + geo.unitBytes)
	for slot := group * ObjectsPerGroup; slot < (group+1)*ObjectsPerGroup; slot++ {
		clear(units)
		off := objectOff(slot)
		unit.Place{Volume: volume, OffBytes: off + lockOff, Kind: unit.KindLock}.
			Seal(units[:geo.unitBytes], unit.Head{Version: 1, Nonce: nonce()})
		unit.Place{Volume: volume, OffBytes: off + identityOff, Kind: unit.KindIdentity}.
			Seal(units[identityOff:], unit.Head{Version: 1, Nonce: nonce()})
		if err := dev.WriteAt(ctx, units, off); err != nil {
			return err
		}
	}
	return dev.Flush(ctx)
}

// InUse tells who has a slot on the volume on dev, if there is a volume; nil when
// nobody has or there is none.
func InUse(ctx context.Context, dev block.Device) ([]lease.SlotView, error) {
	sb, err := readSuperblock(ctx, dev)
	var damaged *block.CorruptError
	if errors.Is(err, ErrNotVolume) || errors.As(err, &damaged) || errors.Is(err, ErrTruncated) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	views, err := lease.Observe(ctx, dev, areaOf(sb))
	if err != nil {
		return nil, err
	}
	var live []lease.SlotView
	for _, s := range views {
		if s.Err == nil && (s.Register.Phase == lease.Live || s.Register.Phase == lease.Kill) {
			live = append(live, s)
		}
	}
	return live, nil
}

// readSuperblock finds the superblock: the first copy, else the tail's, else a
// middle one. The newest valid of those that agree with the first one found
// counts.
func readSuperblock(ctx context.Context, dev block.Device) (*Superblock, error) {
	size := dev.Geometry().SizeBytes
	first, err := readCopy(ctx, dev, SuperblockOff)
	if first == nil {
		if errors.Is(err, ErrFormat) {
			return nil, err
		}
		found, ferr := findCopy(ctx, dev)
		if found == nil {
			return nil, errors.Join(err, ferr)
		}
		first = found
	}
	if first.SizeBytes > size {
		return nil, fmt.Errorf("%w: the device has %d bytes, the volume %d", ErrTruncated, size, first.SizeBytes)
	}
	best := first
	for _, off := range first.copies() {
		if s, _ := readCopy(ctx, dev, off); s != nil && s.Volume == first.Volume && s.Sequence > best.Sequence {
			best = s
		}
	}
	if best.SizeBytes > size {
		return nil, fmt.Errorf("%w: the device has %d bytes, the volume %d", ErrTruncated, size, best.SizeBytes)
	}
	return best, nil
}

func readCopy(ctx context.Context, dev block.Device, off int64) (*Superblock, error) {
	b := block.AlignedBuffer(SuperblockBytes)
	if err := dev.ReadAt(ctx, b, off); err != nil {
		if errors.Is(err, block.ErrOutOfRange) {
			return nil, ErrNotVolume
		}
		return nil, fmt.Errorf("read superblock: %w", err)
	}
	return DecodeSuperblock(b, off)
}

// findCopy looks for a copy without the first one's help: at the end of the
// device, then in the head slab of each group.
func findCopy(ctx context.Context, dev block.Device) (*Superblock, error) {
	size := dev.Geometry().SizeBytes / mib * mib
	offs := []int64{size - mib}
	for off := int64(GroupsOff + MiddleOff); off+SuperblockBytes <= size; off += gib {
		offs = append(offs, off)
	}
	for _, off := range offs {
		if off < 0 {
			continue
		}
		s, err := readCopy(ctx, dev, off)
		if s != nil || errors.Is(err, ErrFormat) {
			return s, err
		}
	}
	return nil, nil
}
