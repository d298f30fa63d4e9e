package datastore

import (
	"context"
	"errors"

	"basalt/block"
	"basalt/thinprov"
	"basalt/vmfs"
)

// objectStore is an object of a volume as the disk engine sees it.
type objectStore struct {
	vol *vmfs.Volume
	obj *vmfs.Object
}

var _ thinprov.Store = objectStore{}

func (s objectStore) Volume() [16]byte         { return s.vol.Superblock().Volume }
func (s objectStore) Self() thinprov.Ref       { return thinprov.Ref(s.obj.Ref()) }
func (s objectStore) LockGeneration() uint64   { return s.obj.LockGeneration() }
func (s objectStore) Geometry() block.Geometry { return s.vol.Device().Geometry() }

func (s objectStore) ReadAt(ctx context.Context, p []byte, offBytes int64) error {
	return s.vol.Device().ReadAt(ctx, p, offBytes)
}

func (s objectStore) WriteAt(ctx context.Context, p []byte, offBytes int64) error {
	return s.vol.Device().WriteAt(ctx, p, offBytes)
}

func (s objectStore) WriteFUA(ctx context.Context, p []byte, offBytes int64) error {
	return s.vol.Device().WriteFUA(ctx, p, offBytes)
}

func (s objectStore) Flush(ctx context.Context) error { return s.vol.Device().Flush(ctx) }

func (s objectStore) Discard(ctx context.Context, offBytes, lenBytes int64) error {
	return s.vol.Device().Discard(ctx, offBytes, lenBytes)
}

// ReadHeader gives the disk engine's part of the object's header; a disk that is
// being created has none yet.
func (s objectStore) ReadHeader(ctx context.Context) ([]byte, error) {
	h, err := s.obj.Header(ctx)
	if err != nil {
		return nil, err
	}
	if len(h.Payload) == 0 {
		return nil, thinprov.ErrNoHeader
	}
	return h.Payload, nil
}

func (s objectStore) WriteHeader(ctx context.Context, payload []byte) error {
	h, err := s.obj.Header(ctx)
	if err != nil {
		return err
	}
	next := *h
	next.Payload = payload
	return s.obj.PutHeader(ctx, next)
}

func (s objectStore) PlanClaim(ctx context.Context, n int, purpose thinprov.Purpose) (thinprov.Plan, error) {
	p, err := s.vol.PlanClaim(ctx, n, purpose == thinprov.PurposeMetadata)
	if err != nil {
		return thinprov.Plan{}, spaceError(err)
	}
	return thinprov.Plan{Units: p.Units, Slabs: addresses(p.Slabs), Purpose: purpose}, nil
}

func (s objectStore) Claim(ctx context.Context, plan thinprov.Plan) ([]int64, error) {
	got, err := s.obj.Claim(ctx, vmfs.Plan{Units: plan.Units, Slabs: numbers(plan.Slabs)}, plan.Purpose == thinprov.PurposeMetadata)
	if err != nil {
		return nil, spaceError(err)
	}
	if len(got) == 0 {
		return nil, thinprov.ErrNoSpace
	}
	return addresses(got), nil
}

func (s objectStore) Release(ctx context.Context, slabs []int64) error {
	return s.obj.Release(ctx, numbers(slabs))
}

func (s objectStore) Settle(ctx context.Context, units []uint32) ([]int64, error) {
	own, err := s.obj.Settle(ctx, units)
	return addresses(own), err
}

func (s objectStore) Unit(slab int64) uint32 { return s.vol.UnitOfSlab(vmfs.SlabAt(slab)) }

// spaceError gives the engine its own word for a full volume.
func spaceError(err error) error {
	if errors.Is(err, vmfs.ErrNoSpace) {
		return errors.Join(thinprov.ErrNoSpace, err)
	}
	return err
}

// addresses turns slab numbers into bytes from the start of the device, as the
// engine names slabs; numbers is its inverse.
func addresses(slabs []int64) []int64 {
	out := make([]int64, len(slabs))
	for i, s := range slabs {
		out[i] = vmfs.SlabOff(s)
	}
	return out
}

func numbers(offs []int64) []int64 {
	out := make([]int64, len(offs))
	for i, o := range offs {
		out[i] = vmfs.SlabAt(o)
	}
	return out
}
