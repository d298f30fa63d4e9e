package vmfs_test

import (
	"context"
	"fmt"
	"testing"

	"basalt/block/simdev"
)

// Operations cost a bounded number of device operations, whatever the size of the
// folder: a removal reads the owner table besides, one read a group.
func TestOperationsTakeFewIOs(t *testing.T) {
	const groups = 20
	lun := newLUN(t, groups*gib+32<<20, 512)
	inSite(t, lun, func(x *site) {
		ctx := x.t.Context()
		v := x.mount("a").Volume
		for i := range 120 { // the root folder lies in blocks
			if err := v.Mkdir(ctx, "/"+long(i)); err != nil {
				x.t.Fatal(err)
			}
		}
		if err := v.Mkdir(ctx, "/d"); err != nil {
			x.t.Fatal(err)
		}
		for _, c := range []struct {
			what string
			most int64
			run  func(ctx context.Context) error
		}{
			{"mkdir", 24, func(ctx context.Context) error { return v.Mkdir(ctx, "/d/x") }},
			{"rename", 25, func(ctx context.Context) error { return v.Rename(ctx, "/d/x", "/d/y") }},
			{"remove", 28 + groups, func(ctx context.Context) error { return v.Remove(ctx, "/d/y") }},
			{"put a short file", 34, func(ctx context.Context) error { return put(ctx, v, "/d/f", 100, 1) }},
			{"lookup", 5, func(ctx context.Context) error { _, err := v.Lookup(ctx, "/d/f"); return err }},
			{"mkdir among many", 31, func(ctx context.Context) error { return v.Mkdir(ctx, "/"+long(500)) }},
			{"remove among many", 41 + groups, func(ctx context.Context) error { return v.Remove(ctx, "/"+long(500)) }},
			{"space", groups + 2, func(ctx context.Context) error { _, err := v.Space(ctx); return err }},
		} {
			x.lun.ResetStats()
			if err := c.run(ctx); err != nil {
				x.t.Fatalf("%s: %v", c.what, err)
			}
			s := x.lun.Stats()
			x.t.Logf("%-18s %3d: %s", c.what, ios(s), fmt.Sprintf("%+v", s))
			if ios(s) > c.most {
				x.t.Errorf("%s takes %d device operations, want at most %d", c.what, ios(s), c.most)
			}
		}
	})
}

func ios(s simdev.Stats) int64 {
	return s.Reads + s.Writes + s.FUAs + s.Flushes + s.Zeroes + s.Discards + s.CAWs
}
