package vmfs_test

import (
	"context"
	"encoding/binary"
	"errors"

	"basalt/vmfs"
)

// testDisk is a disk as these tests need it: its payload names the published
// snapshot, and its slabs.
type testDisk struct {
	published vmfs.Ref
	slabs     []int64
}

func (d testDisk) encode() []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, d.published.Slot)
	b = le.AppendUint16(b, d.published.Incarnation)
	for _, s := range d.slabs {
		b = le.AppendUint32(b, uint32(s))
	}
	return b
}

func decodeDisk(b []byte) (d testDisk) {
	le := binary.LittleEndian
	if len(b) < 6 {
		return d
	}
	d.published = vmfs.Ref{Slot: le.Uint32(b), Incarnation: le.Uint16(b[4:])}
	for b = b[6:]; len(b) >= 4; b = b[4:] {
		d.slabs = append(d.slabs, int64(le.Uint32(b)))
	}
	return d
}

// diskContent is how many bytes of each slab of a disk are written.
const diskContent = 8 << 10

// newDisk creates a disk with slabs of its own, on an origin or on none.
func newDisk(ctx context.Context, v *vmfs.Volume, path string, slabs int, origin vmfs.Ref) error {
	o, err := v.Create(ctx, path, vmfs.New{Kind: vmfs.KindDisk, SizeBytes: 1 << 30, Origin: origin, Init: func(ctx context.Context, o *vmfs.Object) error {
		h, err := o.Header(ctx)
		if err != nil {
			return err
		}
		p, err := v.PlanClaim(ctx, slabs, true)
		if err != nil {
			return err
		}
		next := *h
		next.Intents = p.Units
		if err := o.PutHeader(ctx, next); err != nil {
			return err
		}
		got, err := o.Claim(ctx, p, true)
		if err != nil {
			return err
		}
		// Not flushed: coming to life is what makes it durable.
		for _, s := range got {
			if err := v.Device().WriteAt(ctx, pattern(diskContent, 6), vmfs.SlabOff(s)); err != nil {
				return err
			}
		}
		next.Payload, next.Intents = testDisk{slabs: got}.encode(), nil
		return o.PutHeader(ctx, next)
	}})
	if err != nil {
		return err
	}
	return o.Close(ctx)
}

// withDisk opens a disk under its lock.
func withDisk(ctx context.Context, v *vmfs.Volume, path string, f func(o *vmfs.Object, d testDisk) error) error {
	info, err := v.Lookup(ctx, path)
	if err != nil {
		return err
	}
	o, err := v.Open(ctx, info.Ref, vmfs.LockExclusive, vmfs.NoWait)
	if err != nil {
		return err
	}
	h, err := o.Header(ctx)
	if err == nil {
		err = f(o, decodeDisk(h.Payload))
	}
	return errors.Join(err, o.Close(ctx))
}

// setPublished is the disk engine's durable note of what a snapshot is published as.
func setPublished(ctx context.Context, o *vmfs.Object, ref vmfs.Ref) error {
	h, err := o.Header(ctx)
	if err != nil {
		return err
	}
	d := decodeDisk(h.Payload)
	d.published = ref
	next := *h
	next.Payload = d.encode()
	return o.PutHeader(ctx, next)
}

// publish makes a snapshot of the disk an object, unless it is one.
func publish(ctx context.Context, v *vmfs.Volume, path string) error {
	return withDisk(ctx, v, path, func(o *vmfs.Object, d testDisk) error {
		if live, err := v.IsLive(ctx, d.published); err != nil || live {
			return errors.Join(err, errAlready)
		}
		_, err := v.Publish(ctx, o, [16]byte{7}, 1<<30, func(ref vmfs.Ref) ([]byte, error) {
			return []byte("root"), setPublished(ctx, o, ref)
		})
		return err
	})
}

var errAlready = errors.New("it is so already")

func unpublish(ctx context.Context, v *vmfs.Volume, path string) error {
	return withDisk(ctx, v, path, func(o *vmfs.Object, d testDisk) error {
		if d.published == (vmfs.Ref{}) {
			return errAlready
		}
		if err := v.Unpublish(ctx, d.published); err != nil {
			return err
		}
		return setPublished(ctx, o, vmfs.Ref{})
	})
}

// published reads which object the disk's snapshot is.
func published(ctx context.Context, v *vmfs.Volume, path string) (vmfs.Ref, error) {
	info, err := v.Lookup(ctx, path)
	if err != nil {
		return vmfs.Ref{}, err
	}
	o, err := v.OpenView(ctx, info.Ref)
	if err != nil {
		return vmfs.Ref{}, err
	}
	h, err := o.Header(ctx)
	if err != nil {
		return vmfs.Ref{}, err
	}
	return decodeDisk(h.Payload).published, nil
}

func clone(ctx context.Context, v *vmfs.Volume, from, to string) error {
	ref, err := published(ctx, v, from)
	if err != nil {
		return err
	}
	return newDisk(ctx, v, to, 1, ref)
}
