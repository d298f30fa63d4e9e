package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"basalt/block"
	"basalt/datastore"
	"basalt/lease"
	"basalt/nbd"
	"basalt/thinprov"
	"basalt/vmfs"
)

// exports offers disks and snapshots of a datastore to NBD clients, by path:
// "vm1/d0", "vm1/d0@monday".
type exports struct {
	ds       *datastore.Datastore
	only     []string // paths of the disks offered, without the leading slash; empty: all, later ones too
	readOnly bool
}

// minBlock is the smallest transfer offered to clients: a disk sector.
const minBlock = 512

func (e *exports) offers(disk string) bool {
	return len(e.only) == 0 || slices.Contains(e.only, disk)
}

// resolve splits an export's name; the empty name is the one disk offered.
func (e *exports) resolve(name string) (disk, snapshot string, err error) {
	name = strings.TrimPrefix(name, "/")
	if name == "" && len(e.only) == 1 {
		name = e.only[0]
	}
	disk, snapshot, isSnap := strings.Cut(name, "@")
	if disk == "" || !e.offers(disk) {
		return "", "", fmt.Errorf("%w: %q", nbd.ErrNotFound, name)
	}
	if isSnap && vmfs.CheckName(snapshot) != nil {
		return "", "", fmt.Errorf("%w: %q", nbd.ErrNotFound, name)
	}
	return disk, snapshot, nil
}

// List implements nbd.Exports.
func (e *exports) List(ctx context.Context) ([]string, error) {
	names, err := e.ds.DiskNames(ctx)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(names, func(n string) bool {
		disk, _, _ := strings.Cut(n, "@")
		return !e.offers(disk)
	}), nil
}

// Describe implements nbd.Exports.
func (e *exports) Describe(ctx context.Context, name string) (nbd.Info, error) {
	disk, snapshot, err := e.resolve(name)
	if err != nil {
		return nbd.Info{}, err
	}
	info, err := e.ds.Brief(ctx, disk)
	if err != nil {
		return nbd.Info{}, exportError(err)
	}
	if snapshot != "" && !slices.Contains(info.Snapshots, snapshot) {
		return nbd.Info{}, fmt.Errorf("%w: %q", nbd.ErrNotFound, name)
	}
	return e.info(info.SizeBytes, snapshot != ""), nil
}

func (e *exports) info(sizeBytes int64, snapshot bool) nbd.Info {
	return nbd.Info{SizeBytes: sizeBytes, MinBlock: minBlock, ReadOnly: e.readOnly || snapshot, FastZeroes: true}
}

// Open implements nbd.Exports: the first connection to a disk takes its lock.
func (e *exports) Open(ctx context.Context, name string) (nbd.Export, error) {
	disk, snapshot, err := e.resolve(name)
	if err != nil {
		return nil, err
	}
	if snapshot != "" {
		s, err := e.ds.OpenSnapshot(ctx, disk, snapshot)
		if err != nil {
			return nil, exportError(err)
		}
		return &snapshotExport{s: s, session: e.ds.Volume().Session(), info: e.info(s.SizeBytes(), true)}, nil
	}
	k, err := e.ds.OpenDisk(ctx, disk)
	if err != nil {
		return nil, exportError(err)
	}
	return &diskExport{k: k, session: e.ds.Volume().Session(), info: e.info(k.SizeBytes(), false)}, nil
}

func exportError(err error) error {
	switch {
	case errors.Is(err, vmfs.ErrNotFound), errors.Is(err, datastore.ErrNotDisk), errors.Is(err, datastore.ErrNoSnapshot):
		return errors.Join(nbd.ErrNotFound, err)
	}
	return err
}

// diskExport is one connection's access to a disk.
type diskExport struct {
	k       *datastore.Disk
	session *lease.Session
	info    nbd.Info
}

// answer translates an error for the client. Once the lease is lost nothing may be
// said any more: another host may own the disk.
func answer(session *lease.Session, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, lease.ErrLost) || session.Err() != nil:
		return errors.Join(nbd.ErrLost, err)
	case errors.Is(err, thinprov.ErrNoSpace):
		return errors.Join(nbd.ErrNoSpace, err)
	}
	return err
}

func (x *diskExport) answer(err error) error { return answer(x.session, err) }

func (x *diskExport) Info() nbd.Info { return x.info }

func (x *diskExport) ReadAt(ctx context.Context, p []byte, offBytes int64) error {
	return x.answer(x.k.ReadAt(ctx, p, offBytes))
}

func (x *diskExport) WriteAt(ctx context.Context, p []byte, offBytes int64) error {
	return x.answer(x.k.WriteAt(ctx, p, offBytes))
}

func (x *diskExport) WriteFUA(ctx context.Context, p []byte, offBytes int64) error {
	return x.answer(x.k.WriteFUA(ctx, p, offBytes))
}

func (x *diskExport) Flush(ctx context.Context) error { return x.answer(x.k.Flush(ctx)) }

func (x *diskExport) Trim(ctx context.Context, offBytes, lenBytes int64) error {
	return x.answer(x.k.Discard(ctx, offBytes, lenBytes))
}

// zeroChunk is how much is written at once where zeros must be allocated.
const zeroChunk = 1 << 20

func (x *diskExport) WriteZeroes(ctx context.Context, offBytes, lenBytes int64, o nbd.ZeroOptions) error {
	if !o.NoHole {
		err := x.k.WriteZeroes(ctx, offBytes, lenBytes)
		if err == nil && o.FUA {
			err = x.k.Flush(ctx)
		}
		return x.answer(err)
	}
	if o.Fast {
		return nbd.ErrNotSupported
	}
	zeros := block.AlignedBuffer(int(min(zeroChunk, lenBytes)))
	for lenBytes > 0 {
		n := min(lenBytes, int64(len(zeros)))
		if err := x.k.WriteAt(ctx, zeros[:n], offBytes); err != nil {
			return x.answer(err)
		}
		offBytes, lenBytes = offBytes+n, lenBytes-n
	}
	if o.FUA {
		return x.answer(x.k.Flush(ctx))
	}
	return nil
}

func (x *diskExport) BlockStatus(ctx context.Context, offBytes, lenBytes int64, emit func(nbd.Extent) bool) error {
	return x.answer(x.k.Map(ctx, offBytes, lenBytes, emitRuns(emit)))
}

func (x *diskExport) Close() error { return x.k.Close(context.Background()) }

func emitRuns(emit func(nbd.Extent) bool) func(thinprov.Run) bool {
	return func(r thinprov.Run) bool {
		return emit(nbd.Extent{LenBytes: r.LenBytes, Hole: !r.Mapped, Zero: !r.Mapped})
	}
}

// snapshotExport is one connection's access to a snapshot, for reading. The server
// refuses writes before they get here.
type snapshotExport struct {
	s       *datastore.Snapshot
	session *lease.Session
	info    nbd.Info
}

func (x *snapshotExport) Info() nbd.Info { return x.info }

func (x *snapshotExport) ReadAt(ctx context.Context, p []byte, offBytes int64) error {
	return answer(x.session, x.s.ReadAt(ctx, p, offBytes))
}

func (x *snapshotExport) WriteAt(context.Context, []byte, int64) error  { return nbd.ErrReadOnly }
func (x *snapshotExport) WriteFUA(context.Context, []byte, int64) error { return nbd.ErrReadOnly }
func (x *snapshotExport) Flush(context.Context) error                   { return nil }
func (x *snapshotExport) Trim(context.Context, int64, int64) error      { return nbd.ErrReadOnly }

func (x *snapshotExport) WriteZeroes(context.Context, int64, int64, nbd.ZeroOptions) error {
	return nbd.ErrReadOnly
}

func (x *snapshotExport) BlockStatus(ctx context.Context, offBytes, lenBytes int64, emit func(nbd.Extent) bool) error {
	return answer(x.session, x.s.Map(ctx, offBytes, lenBytes, emitRuns(emit)))
}

func (x *snapshotExport) Close() error { return x.s.Close(context.Background()) }
