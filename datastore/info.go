package datastore

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"time"

	"basalt/block"
	"basalt/lease"
	"basalt/thinprov"
	"basalt/vmfs"
)

// DiskInfo is what there is to know of a disk. Its JSON is part of the command
// contract.
type DiskInfo struct {
	Path           string         `json:"path"`
	SizeBytes      int64          `json:"size_bytes"`
	MappedBytes    int64          `json:"mapped_bytes"`
	ExclusiveBytes int64          `json:"exclusive_bytes"`
	SharedBytes    int64          `json:"shared_bytes"`
	Policy         string         `json:"policy"`
	LockedBy       string         `json:"locked_by"`
	UUID           string         `json:"uuid"`
	Origin         string         `json:"origin,omitempty"` // uuid of the snapshot that a clone started from
	Snapshots      []SnapshotInfo `json:"snapshots"`
}

// SnapshotInfo is what there is to know of a snapshot.
type SnapshotInfo struct {
	Name           string    `json:"name"`
	Created        time.Time `json:"created"`
	MappedBytes    int64     `json:"mapped_bytes"`
	ExclusiveBytes int64     `json:"exclusive_bytes"`
	UUID           string    `json:"uuid"`
	Published      bool      `json:"published"`
}

// inspectTries bounds how often a disk that is being changed is read anew.
const inspectTries = 8

// Info describes a disk.
func (d *Datastore) Info(ctx context.Context, path string) (DiskInfo, error) {
	var out DiskInfo
	err := d.look(ctx, path, func(ref vmfs.Ref, k *thinprov.Disk) (err error) {
		out, err = d.describe(ctx, path, ref, k)
		return err
	})
	return out, err
}

// Brief is what can be told of a disk without walking its maps.
type Brief struct {
	SizeBytes int64
	Snapshots []string // names, oldest first
}

// Brief describes a disk in short.
func (d *Datastore) Brief(ctx context.Context, path string) (Brief, error) {
	var out Brief
	err := d.look(ctx, path, func(_ vmfs.Ref, k *thinprov.Disk) error {
		out = Brief{SizeBytes: k.SizeBytes()}
		for _, s := range k.Snapshots() {
			out.Snapshots = append(out.Snapshots, s.Name)
		}
		return nil
	})
	return out, err
}

// look shows a disk's metadata to f: those of the instance that is open in this
// process, else what can be read without its lock. A disk that changes under the
// reader is read anew.
func (d *Datastore) look(ctx context.Context, path string, f func(vmfs.Ref, *thinprov.Disk) error) error {
	info, err := d.lookupDisk(ctx, path)
	if err != nil {
		return err
	}
	if d.openUsers(info.Ref) > 0 {
		return d.with(ctx, path, func(k *Disk) error { return f(info.Ref, k.engine) })
	}
	for try := 1; ; try++ {
		k, err := d.inspect(ctx, info.Ref)
		if err == nil {
			err = errors.Join(f(info.Ref, k), k.Close(ctx))
		}
		var torn *block.CorruptError
		if err == nil || try == inspectTries || !errors.As(err, &torn) {
			return err
		}
	}
}

func (d *Datastore) describe(ctx context.Context, path string, ref vmfs.Ref, k *thinprov.Disk) (DiskInfo, error) {
	st, err := k.Stat(ctx)
	if err != nil {
		return DiskInfo{}, err
	}
	out := DiskInfo{
		Path: path, SizeBytes: st.SizeBytes, MappedBytes: st.MappedBytes, ExclusiveBytes: st.ExclusiveBytes,
		SharedBytes: st.SharedBytes, Policy: "thin", UUID: uuidString(k.UUID()), Snapshots: []SnapshotInfo{},
	}
	for _, s := range k.Snapshots() {
		ss, err := k.SnapshotStat(ctx, s.UUID)
		if err != nil {
			return DiskInfo{}, err
		}
		out.Snapshots = append(out.Snapshots, SnapshotInfo{
			Name: s.Name, Created: s.Created.UTC(), MappedBytes: ss.MappedBytes, ExclusiveBytes: ss.ExclusiveBytes,
			UUID: uuidString(s.UUID), Published: s.Published != (thinprov.Ref{}),
		})
	}
	if out.Origin, err = d.originOf(ctx, ref); err != nil {
		return DiskInfo{}, err
	}
	out.LockedBy, err = d.lockedBy(ctx, ref)
	return out, err
}

// originOf gives the uuid of the snapshot that a clone started from; "" for a disk
// that is none.
func (d *Datastore) originOf(ctx context.Context, ref vmfs.Ref) (string, error) {
	o, err := d.vol.OpenView(ctx, ref)
	if err != nil {
		return "", err
	}
	h, err := o.Header(ctx)
	if err != nil || h.Origin == (vmfs.Ref{}) {
		return "", err
	}
	return uuidString(h.OriginUUID), nil
}

// lockedBy names the host whose generation has the lock and is not dead.
func (d *Datastore) lockedBy(ctx context.Context, ref vmfs.Ref) (string, error) {
	h, err := d.Holder(ctx, ref)
	if err != nil || h == nil {
		return "", err
	}
	return h.Register.HostName, nil
}

// Holder gives the slot of the host that has an object exclusively locked; nil when
// nobody has, or the holder's generation is dead. It needs no slot.
func (d *Datastore) Holder(ctx context.Context, ref vmfs.Ref) (*lease.SlotView, error) {
	l, err := d.vol.LockOf(ctx, ref)
	if err != nil || l.Mode != vmfs.LockExclusive {
		return nil, err
	}
	hosts, err := d.vol.Hosts(ctx)
	if err != nil {
		return nil, err
	}
	s := hosts[l.Owner.Slot]
	if s.Err != nil || s.Register.Dead(l.Owner.Generation) {
		return nil, s.Err
	}
	return &s, nil
}

// ListDisks describes all disks at or below a path, by name.
func (d *Datastore) ListDisks(ctx context.Context, path string) ([]DiskInfo, error) {
	at, err := d.vol.Lookup(ctx, path)
	if err != nil {
		return nil, err
	}
	var paths []string
	switch at.Kind {
	case vmfs.KindDisk:
		paths = []string{path}
	case vmfs.KindFolder:
		if paths, err = d.diskPaths(ctx, at.Ref, path); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("%s: %w: it is a %v", path, ErrNotDisk, at.Kind)
	}
	out := []DiskInfo{}
	for _, p := range paths {
		info, err := d.Info(ctx, p)
		if errors.Is(err, vmfs.ErrNotFound) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p, err)
		}
		out = append(out, info)
	}
	return out, nil
}

func (d *Datastore) diskPaths(ctx context.Context, folder vmfs.Ref, prefix string) ([]string, error) {
	names, err := vmfs.SplitPath(prefix)
	if err != nil {
		return nil, err
	}
	base := "/"
	for _, n := range names {
		base += n + "/"
	}
	var paths []string
	err = d.vol.Walk(ctx, folder, func(p string, info vmfs.Info) error {
		if info.Kind == vmfs.KindDisk {
			paths = append(paths, base+p)
		}
		return nil
	})
	sort.Strings(paths)
	return paths, err
}

// DiskNames lists the paths of all disks, without the leading slash, and of their
// snapshots as path@name.
func (d *Datastore) DiskNames(ctx context.Context) ([]string, error) {
	root, err := d.vol.Lookup(ctx, "/")
	if err != nil {
		return nil, err
	}
	paths, err := d.diskPaths(ctx, root.Ref, "/")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, p := range paths {
		k, err := d.Brief(ctx, p)
		if errors.Is(err, vmfs.ErrNotFound) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		names = append(names, p[1:])
		for _, s := range k.Snapshots {
			names = append(names, p[1:]+"@"+s)
		}
	}
	return names, nil
}

func uuidString(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[0:4], u[4:6], u[6:8], u[8:10], u[10:16])
}
