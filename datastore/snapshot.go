package datastore

import (
	"context"
	"errors"
	"fmt"

	"basalt/thinprov"
	"basalt/thinprov/layout"
	"basalt/vmfs"
)

// CreateSnapshot takes a snapshot of a disk, in use or not, at constant cost.
func (d *Datastore) CreateSnapshot(ctx context.Context, path, name string) error {
	if err := vmfs.CheckName(name); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	return d.with(ctx, path, func(k *Disk) error {
		_, err := k.engine.Snapshot(ctx, name, newUUID())
		return k.d.vouched(ctx, err)
	})
}

// RemoveSnapshot deletes a snapshot and frees what only it held. It refuses one
// that clones depend on.
func (d *Datastore) RemoveSnapshot(ctx context.Context, path, name string) error {
	return d.with(ctx, path, func(k *Disk) error {
		if err := d.unpublish(ctx, k, path, name); err != nil {
			return err
		}
		s, err := findSnapshot(k.engine, path, name)
		if err != nil {
			return err
		}
		return k.engine.DeleteSnapshot(ctx, s.UUID)
	})
}

// unpublish takes back that a snapshot is an object of its own, if it is one.
func (d *Datastore) unpublish(ctx context.Context, k *Disk, path, name string) error {
	k.sh.publishing.Lock()
	defer k.sh.publishing.Unlock()
	s, err := findSnapshot(k.engine, path, name)
	if err != nil || s.Published == (thinprov.Ref{}) {
		return err
	}
	if err := d.vol.Unpublish(ctx, vmfs.Ref(s.Published)); err != nil {
		if errors.Is(err, vmfs.ErrInUse) {
			return fmt.Errorf("snapshot %q has clones; remove them first: %w", s.Name, vmfs.ErrInUse)
		}
		return err
	}
	return k.engine.Unpublish(ctx, s.UUID)
}

func findSnapshot(k *thinprov.Disk, path, name string) (thinprov.Snapshot, error) {
	for _, s := range k.Snapshots() {
		if s.Name == name {
			return s, nil
		}
	}
	return thinprov.Snapshot{}, fmt.Errorf("%s@%s: %w", path, name, ErrNoSnapshot)
}

// Clone makes a new disk that starts as the snapshot and shares its blocks, at
// constant cost. The snapshot is published for it, once, under its disk's lock; a
// snapshot that is published already can be cloned by any host.
func (d *Datastore) Clone(ctx context.Context, path, snapshot, to string) error {
	pub, err := d.published(ctx, path, snapshot)
	if errors.Is(err, errUnpublished) {
		err = d.with(ctx, path, func(k *Disk) error {
			pub, err = d.publish(ctx, k, path, snapshot)
			return err
		})
	}
	if err != nil {
		return err
	}
	payload, err := d.publishedPayload(ctx, pub)
	if err != nil {
		return err
	}
	p, err := layout.DecodePublished(d.vol.Superblock().Volume, payload)
	if err != nil {
		return err
	}
	o, err := d.vol.Create(ctx, to, vmfs.New{
		Kind: vmfs.KindDisk, SizeBytes: p.SizeBytes, Origin: pub, OriginUUID: p.UUID,
		Init: func(ctx context.Context, o *vmfs.Object) error {
			return thinprov.CreateClone(ctx, objectStore{d.vol, o}, d.clk, payload, thinprov.Ref(pub), thinprov.CreateOptions{UUID: newUUID(), BootID: d.boot})
		},
	})
	if err != nil {
		return err
	}
	return o.Close(ctx)
}

var errUnpublished = errors.New("datastore: snapshot is not published")

// published looks, without a lock, for the object that a snapshot is published as.
func (d *Datastore) published(ctx context.Context, path, name string) (vmfs.Ref, error) {
	info, err := d.lookupDisk(ctx, path)
	if err != nil {
		return vmfs.Ref{}, err
	}
	k, err := d.inspect(ctx, info.Ref)
	if err != nil {
		return vmfs.Ref{}, errUnpublished // being changed: ask again under the lock
	}
	s, err := findSnapshot(k, path, name)
	if cerr := k.Close(ctx); cerr != nil {
		return vmfs.Ref{}, cerr
	}
	if err != nil || s.Published == (thinprov.Ref{}) {
		return vmfs.Ref{}, errUnpublished
	}
	live, err := d.vol.IsLive(ctx, vmfs.Ref(s.Published))
	if err != nil || !live {
		return vmfs.Ref{}, errors.Join(err, errUnpublished)
	}
	return vmfs.Ref(s.Published), nil
}

// publish makes a snapshot an object under its disk's lock (R17).
func (d *Datastore) publish(ctx context.Context, k *Disk, path, name string) (vmfs.Ref, error) {
	k.sh.publishing.Lock()
	defer k.sh.publishing.Unlock()
	s, err := findSnapshot(k.engine, path, name)
	if err != nil {
		return vmfs.Ref{}, err
	}
	if s.Published != (thinprov.Ref{}) {
		live, err := d.vol.IsLive(ctx, vmfs.Ref(s.Published))
		if err != nil || live {
			return vmfs.Ref(s.Published), err
		}
		// An earlier publishing came no further than the disk's log.
		if err := k.engine.Unpublish(ctx, s.UUID); err != nil {
			return vmfs.Ref{}, err
		}
	}
	return d.vol.Publish(ctx, k.sh.obj, s.UUID, k.SizeBytes(), func(ref vmfs.Ref) ([]byte, error) {
		return k.engine.Publish(ctx, s.UUID, thinprov.Ref(ref))
	})
}

// publishedPayload reads what a published snapshot's header holds.
func (d *Datastore) publishedPayload(ctx context.Context, ref vmfs.Ref) ([]byte, error) {
	o, err := d.vol.OpenView(ctx, ref)
	if err != nil {
		return nil, err
	}
	h, err := o.Header(ctx)
	if err != nil {
		return nil, err
	}
	return h.Payload, nil
}

// RemoveDisk deletes a disk with its snapshots. It refuses one that is in use or
// whose snapshots have clones.
func (d *Datastore) RemoveDisk(ctx context.Context, path string) error {
	info, err := d.lookupDisk(ctx, path)
	if err != nil {
		return err
	}
	if d.openUsers(info.Ref) > 0 {
		return fmt.Errorf("%s: %w: disconnect its users first", path, ErrDiskOpen)
	}
	if info.Identity.Count > 0 || info.Identity.Pending.Delta != 0 {
		if err := d.with(ctx, path, func(k *Disk) error {
			for _, s := range k.engine.Snapshots() {
				if err := d.unpublish(ctx, k, path, s.Name); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return d.vol.Remove(ctx, path)
}

// OpenSnapshot opens a snapshot of a disk for reading. The disk stays open for as
// long.
func (d *Datastore) OpenSnapshot(ctx context.Context, path, name string) (*Snapshot, error) {
	k, err := d.OpenDisk(ctx, path)
	if err != nil {
		return nil, err
	}
	s, err := findSnapshot(k.engine, path, name)
	if err != nil {
		return nil, errors.Join(err, k.Close(ctx))
	}
	v, err := k.engine.View(ctx, s.UUID)
	if err != nil {
		return nil, errors.Join(err, k.Close(ctx))
	}
	return &Snapshot{view: v, disk: k}, nil
}

// Snapshot is a snapshot that is open for reading.
type Snapshot struct {
	view *thinprov.View
	disk *Disk
}

// SizeBytes is the snapshot's size.
func (s *Snapshot) SizeBytes() int64 { return s.view.SizeBytes() }

// ReadAt fills p from offBytes.
func (s *Snapshot) ReadAt(ctx context.Context, p []byte, offBytes int64) error {
	return s.disk.d.vouched(ctx, s.view.ReadAt(ctx, p, offBytes))
}

// Map tells which parts of a range are mapped; see Disk.Map.
func (s *Snapshot) Map(ctx context.Context, offBytes, lenBytes int64, emit func(thinprov.Run) bool) error {
	return s.disk.d.vouched(ctx, s.view.Map(ctx, offBytes, lenBytes, emit))
}

// Close ends the access.
func (s *Snapshot) Close(ctx context.Context) error {
	return errors.Join(s.view.Close(), s.disk.Close(ctx))
}
