package datastore

import (
	"context"
	"fmt"

	"basalt/thinprov"
	"basalt/thinprov/layout"
	"basalt/vmfs"
)

// Check verifies the volume and every disk on it; see vmfs.Check.
func (d *Datastore) Check(ctx context.Context) (*vmfs.Report, error) {
	return d.vol.Check(ctx, d.checkDisk)
}

// checkDisk has the disk engine look at one disk. A published snapshot owns no
// slab; its tree is checked with its disk's.
func (d *Datastore) checkDisk(ctx context.Context, o *vmfs.Object) (vmfs.DiskReport, error) {
	if o.Kind() == vmfs.KindSnapshot {
		h, err := o.Header(ctx)
		if err != nil {
			return vmfs.DiskReport{}, err
		}
		if _, err := layout.DecodePublished(d.vol.Superblock().Volume, h.Payload); err != nil {
			return vmfs.DiskReport{}, err
		}
		return vmfs.DiskReport{}, nil
	}
	r, err := thinprov.Check(ctx, objectStore{d.vol, o})
	if err != nil {
		return vmfs.DiskReport{}, err
	}
	out := vmfs.DiskReport{Slabs: numbers(r.Slabs), Claiming: r.Claiming, Releasing: numbers(r.Releasing)}
	for _, f := range r.Findings {
		s := vmfs.Leak
		if f.Severity == thinprov.Damage {
			s = vmfs.Damage
		}
		out.Findings = append(out.Findings, vmfs.Finding{Severity: s, Where: fmt.Sprintf("byte %d", f.OffBytes), What: f.Text})
	}
	return out, nil
}
