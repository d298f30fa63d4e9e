package vmfs

import (
	"context"
	"errors"
	"fmt"
)

// tableGroups reads how many groups have their part of the object table.
func (v *Volume) tableGroups(ctx context.Context) (uint32, error) {
	p := v.volumePlace()
	img, _, err := p.Read(ctx, v.dev)
	if err != nil {
		return 0, err
	}
	r, err := decodeVolumeRecord(p, img, v.geo)
	return r.TableGroups, err
}

// extendTable initialises the next group's part of the object table, unless
// another host has, under the volume lock.
func (v *Volume) extendTable(ctx context.Context, have uint32) error {
	if int64(have) >= v.geo.tableGroups() {
		return fmt.Errorf("%w: the volume has %d", ErrNoObjects, have*ObjectsPerGroup)
	}
	l, err := v.acquire(ctx, volumeSlot, LockExclusive, operation)
	if err != nil {
		return err
	}
	err = errors.Join(v.extendLocked(context.WithoutCancel(ctx), have), l.release(ctx))
	v.mu.Lock()
	v.slots = have * ObjectsPerGroup // where the new part begins
	v.mu.Unlock()
	return err
}

// tableFullError: none of the object slots that were looked at is free, in a table
// of so many groups.
type tableFullError struct{ groups uint32 }

func (e *tableFullError) Error() string {
	return fmt.Sprintf("vmfs: no free object slot in %d groups", e.groups)
}

// extendLocked zeroes the part, writes its units, flushes, and then raises the
// count (R6). An earlier holder's raise that is still on its way must not land
// between: others would use the part while it is being zeroed. So the volume unit
// is superseded first.
func (v *Volume) extendLocked(ctx context.Context, have uint32) error {
	p := v.volumePlace()
	img, err := v.supersede(ctx, p, func(img []byte) (bool, error) {
		r, err := decodeVolumeRecord(p, img, v.geo)
		return r.TableGroups == have, err
	})
	if err != nil {
		return err
	}
	if r, err := decodeVolumeRecord(p, img, v.geo); err != nil || r.TableGroups != have {
		return err
	}
	if err := initTablePart(ctx, v.dev, v.sb.Volume, v.geo, have, v.nonce); err != nil {
		return err
	}
	_, err = v.change(ctx, p, func(img []byte) ([]byte, error) {
		r, err := decodeVolumeRecord(p, img, v.geo)
		if err != nil {
			return nil, err
		}
		r.TableGroups = max(r.TableGroups, have+1)
		return r.encode(img), nil
	})
	return err
}
