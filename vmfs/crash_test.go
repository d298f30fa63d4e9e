package vmfs_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"

	"basalt/block/simdev"
	"basalt/internal/clock"
	"basalt/vmfs"
)

// scenario is one operation that must leave the volume as it was or as it should
// be, whatever happens to its host.
type scenario struct {
	name      string
	sizeBytes int64 // of the volume; default 96 MiB
	setup     func(ctx context.Context, v *vmfs.Volume) error
	run       func(ctx context.Context, v *vmfs.Volume) error
	done      error // what run returns when it has been done before
}

const longName = 200

func long(i int) string { return fmt.Sprintf("%03d%s", i, strings.Repeat("n", longName-3)) }

// inlineNames is how many such names just fit into a folder's header.
const inlineNames = 56

func scenarios() []scenario {
	nothing := func(context.Context, *vmfs.Volume) error { return nil }
	two := func(ctx context.Context, v *vmfs.Volume) error {
		for _, err := range []error{v.Mkdir(ctx, "/a"), v.Mkdir(ctx, "/b"), put(ctx, v, "/a/f", 5000, 1), v.Mkdir(ctx, "/a/sub"), put(ctx, v, "/a/sub/g", 10, 2)} {
			if err != nil {
				return err
			}
		}
		return nil
	}
	disk := func(ctx context.Context, v *vmfs.Volume) error { return newDisk(ctx, v, "/d", 2, vmfs.Ref{}) }
	pub := func(ctx context.Context, v *vmfs.Volume) error {
		if err := disk(ctx, v); err != nil {
			return err
		}
		return publish(ctx, v, "/d")
	}
	cloned := func(ctx context.Context, v *vmfs.Volume) error {
		if err := pub(ctx, v); err != nil {
			return err
		}
		return clone(ctx, v, "/d", "/c")
	}
	names := func(n int) func(ctx context.Context, v *vmfs.Volume) error {
		return func(ctx context.Context, v *vmfs.Volume) error {
			for i := range n {
				if err := v.Mkdir(ctx, "/"+long(i)); err != nil {
					return err
				}
			}
			return nil
		}
	}
	return []scenario{
		{name: "put a short file", setup: nothing, done: vmfs.ErrExists,
			run: func(ctx context.Context, v *vmfs.Volume) error { return put(ctx, v, "/f", 100, 3) }},
		{name: "put a file in slabs", setup: nothing, done: vmfs.ErrExists,
			run: func(ctx context.Context, v *vmfs.Volume) error { return put(ctx, v, "/f", 1<<20+7, 4) }},
		{name: "mkdir", setup: two, done: vmfs.ErrExists,
			run: func(ctx context.Context, v *vmfs.Volume) error { return v.Mkdir(ctx, "/a/new") }},
		{name: "remove a file", done: vmfs.ErrNotFound,
			setup: func(ctx context.Context, v *vmfs.Volume) error { return put(ctx, v, "/f", 20000, 5) },
			run:   func(ctx context.Context, v *vmfs.Volume) error { return v.Remove(ctx, "/f") }},
		{name: "rename in a folder", setup: two, done: vmfs.ErrNotFound,
			run: func(ctx context.Context, v *vmfs.Volume) error { return v.Rename(ctx, "/a/f", "/a/h") }},
		{name: "move a file", setup: two, done: vmfs.ErrNotFound,
			run: func(ctx context.Context, v *vmfs.Volume) error { return v.Rename(ctx, "/a/f", "/b/h") }},
		{name: "move a folder", setup: two, done: vmfs.ErrNotFound,
			run: func(ctx context.Context, v *vmfs.Volume) error { return v.Rename(ctx, "/a/sub", "/b/sub") }},
		{name: "create a disk", setup: nothing, done: vmfs.ErrExists, run: disk},
		{name: "publish", setup: disk, done: errAlready,
			run: func(ctx context.Context, v *vmfs.Volume) error { return publish(ctx, v, "/d") }},
		{name: "unpublish", setup: pub, done: errAlready,
			run: func(ctx context.Context, v *vmfs.Volume) error { return unpublish(ctx, v, "/d") }},
		{name: "clone", setup: pub, done: vmfs.ErrExists,
			run: func(ctx context.Context, v *vmfs.Volume) error { return clone(ctx, v, "/d", "/c") }},
		{name: "remove a clone", setup: cloned, done: vmfs.ErrNotFound,
			run: func(ctx context.Context, v *vmfs.Volume) error { return v.Remove(ctx, "/c") }},
		{name: "folder outgrows its header", setup: names(inlineNames), done: vmfs.ErrExists,
			run: func(ctx context.Context, v *vmfs.Volume) error { return v.Mkdir(ctx, "/"+long(inlineNames)) }},
		{name: "name leaves a folder of blocks", setup: names(inlineNames + 4), done: vmfs.ErrNotFound,
			run: func(ctx context.Context, v *vmfs.Volume) error { return v.Remove(ctx, "/"+long(3)) }},
		{name: "object table is extended", setup: names(vmfs.ObjectsPerGroup - 2), done: vmfs.ErrExists, sizeBytes: 3 << 30,
			run: func(ctx context.Context, v *vmfs.Volume) error { return v.Mkdir(ctx, "/new") }},
	}
}

// prepared is a scenario's LUN before the operation, and what the volume shows and
// uses before and after.
type prepared struct {
	scenario
	lun                   *simdev.LUN
	before, after         map[string]string
	usedBefore, usedAfter int64
	changes               int // device changes of the operation
	caws                  int // compare-and-writes of the operation
	mountCAWs             int // and of mounting
}

func prepare(t *testing.T, s scenario) *prepared {
	t.Helper()
	if s.sizeBytes == 0 {
		s.sizeBytes = 96 << 20
	}
	p := &prepared{scenario: s}
	p.lun = simdev.New(simdev.Options{SizeBytes: s.sizeBytes, LogicalBytes: 512, Seed: 1, DiscardGarbage: true})
	if err := vmfs.Format(t.Context(), p.lun.Host("mkfs"), clock.System{}, vmfs.FormatOptions{Volume: testVolume, Lease: siteLease}); err != nil {
		t.Fatal(err)
	}
	inSite(t, p.lun, func(x *site) {
		h := x.mount("setup")
		if err := s.setup(x.t.Context(), h.Volume); err != nil {
			x.t.Fatal(err)
		}
		p.before, p.usedBefore = tree(x.t, h.Volume), used(x.t, h.Volume)
		x.leave()
		p.lun = x.lun.Clone()
		x.lun.ResetStats()
		h = x.mount("a")
		p.mountCAWs = int(x.lun.Stats().CAWs)
		changes, caws := changesOf(h.nexus), h.nexus.Stats().CAWs
		if err := s.run(x.t.Context(), h.Volume); err != nil {
			x.t.Fatal(err)
		}
		p.changes = int(changesOf(h.nexus) - changes)
		p.caws = int(h.nexus.Stats().CAWs - caws)
		p.after, p.usedAfter = tree(x.t, h.Volume), used(x.t, h.Volume)
		x.leave()
		x.check("after the operation", vmfs.Note)
	})
	return p
}

func changesOf(h *simdev.Handle) int64 {
	s := h.Stats()
	return s.Writes + s.FUAs + s.Flushes + s.Zeroes + s.Discards + s.CAWs
}

// verify looks at a volume after a fault: nothing is damaged, it shows what it did
// before or what it should after, and never the former when the operation was
// acknowledged; the operation can be run to its end, and then no space is lost.
func (p *prepared) verify(x *site, what string, acked bool) {
	x.t.Helper()
	x.check(what, vmfs.Note)
	b := x.mount("b")
	x.breakOthers(b)
	now := tree(x.t, b.Volume)
	isOld, isNew := maps.Equal(now, p.before), maps.Equal(now, p.after)
	if !isNew && (acked || !isOld) {
		x.t.Errorf("%s: acknowledged: %v, and the volume shows%s\nbefore it was%s\nafter it should be%s", what, acked, describe(now), describe(p.before), describe(p.after))
		return
	}
	switch err := p.run(x.t.Context(), b.Volume); {
	case isNew && err != nil && !is(err, p.done):
		x.t.Errorf("%s: run again after it was done: %v", what, err)
	case !isNew && err != nil:
		x.t.Errorf("%s: run again: %v", what, err)
	}
	if now := tree(x.t, b.Volume); !maps.Equal(now, p.after) {
		x.t.Errorf("%s: run again, the volume shows%s\nit should be%s", what, describe(now), describe(p.after))
	}
	// A change of each folder finds what is left in it.
	for path, kind := range p.after {
		if kind == vmfs.KindFolder.String() && len(p.after) < 20 {
			p.touch(x, b, path)
		}
	}
	p.touch(x, b, "")
	if now := used(x.t, b.Volume); now != p.usedAfter {
		x.t.Errorf("%s: %d bytes are used in the end, want %d", what, now, p.usedAfter)
	}
	x.leave()
	x.check(what+", in the end", vmfs.Note)
}

func (p *prepared) touch(x *site, b *host, path string) {
	x.t.Helper()
	if err := b.Mkdir(x.t.Context(), path+"/touch"); err != nil {
		x.t.Error(err)
	}
	if err := b.Remove(x.t.Context(), path+"/touch"); err != nil {
		x.t.Error(err)
	}
}

// points are the device changes after which to crash: each of the first ones, and
// some of the many writes of a large initialisation.
func (p *prepared) points() []int {
	var at []int
	for n := 0; n <= p.changes; n++ {
		at = append(at, n)
		if p.changes > 100 && n > 6 && n < p.changes-16 {
			n += 80
		}
	}
	return at
}

// Every operation is atomic under the death of its host, and of the target's power,
// after each of its writes.
func TestCrashAfterEveryWrite(t *testing.T) {
	for _, s := range scenarios() {
		t.Run(s.name, func(t *testing.T) {
			p := prepare(t, s)
			for _, n := range p.points() {
				inSite(t, p.lun, func(x *site) {
					a := x.mount("a")
					a.nexus.StopAfter(n)
					err := p.run(x.t.Context(), a.Volume)
					crashed := x.lun.CrashClone(rand.New(rand.NewPCG(uint64(n), 1)))
					what := fmt.Sprintf("host died after %d of %d changes (%v)", n, p.changes, err)
					p.verify(x, what, err == nil)
					x.on(crashed)
					p.verify(x, strings.Replace(what, "host died", "power failed", 1), err == nil)
				})
			}
		})
	}
}
