package vmfs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"basalt/block"
	"basalt/block/simdev"
	"basalt/internal/clock"
	"basalt/vmfs"
)

// site is a LUN and its hosts in a synctest bubble, where time passes only while
// everybody waits.
type site struct {
	t     *testing.T
	lun   *simdev.LUN
	clk   *clock.Fake
	hosts []*host
	lives map[int]uint32 // latest generation that the site mounted, by host slot
}

// host is one mount.
type host struct {
	*vmfs.Volume
	nexus *simdev.Handle
}

const (
	siteTick  = 10 * time.Millisecond
	siteLease = time.Second
)

// inSite runs a test in a bubble, on a copy of lun.
func inSite(t *testing.T, lun *simdev.LUN, run func(x *site)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		x := &site{t: t, lun: lun.Clone(), clk: clock.NewFake(), lives: map[int]uint32{}}
		stop, stopped := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(stopped)
			for {
				synctest.Wait()
				select {
				case <-stop:
					return
				default:
					x.clk.Advance(siteTick)
				}
			}
		}()
		defer func() { close(stop); <-stopped }()
		defer x.leave()
		run(x)
	})
}

// leave unmounts everybody. Hosts that a test has killed or fenced cannot.
func (x *site) leave() {
	for _, h := range x.hosts {
		h.nexus.Thaw()
		_ = h.Close(context.Background())
	}
	x.hosts = nil
}

// on points the site at another LUN, of which it makes no copy.
func (x *site) on(lun *simdev.LUN) {
	x.leave()
	x.lun = lun
}

func (x *site) mount(name string) *host {
	x.t.Helper()
	return x.mountThrough(name, func(d block.Device) block.Device { return d })
}

// mountThrough mounts a host that reaches the LUN through a wrapper.
func (x *site) mountThrough(name string, wrap func(block.Device) block.Device) *host {
	x.t.Helper()
	nexus := x.lun.Host(name)
	v, err := vmfs.Mount(x.t.Context(), wrap(nexus), nexus, x.clk, slog.New(slog.DiscardHandler), vmfs.MountOptions{HostName: name, HostID: [16]byte{1}})
	if err != nil {
		x.t.Fatal(err)
	}
	h := &host{v, nexus}
	x.hosts = append(x.hosts, h)
	x.lives[v.Session().Slot()] = v.Session().Generation()
	return h
}

// breakOthers cuts every other host off, as their watchers would.
func (x *site) breakOthers(h *host) {
	x.t.Helper()
	for slot, generation := range x.lives {
		if slot == h.Session().Slot() {
			continue
		}
		if err := h.Session().Break(x.t.Context(), slot, generation); err != nil {
			x.t.Fatalf("break slot %d: %v", slot, err)
		}
	}
}

// check verifies the volume as a reader and fails on findings above the severity.
func (x *site) check(what string, allowed vmfs.Severity) {
	x.t.Helper()
	v, err := vmfs.View(x.t.Context(), x.lun.Host("check"), x.clk)
	if err != nil {
		x.t.Fatalf("%s: %v", what, err)
	}
	r, err := v.Check(x.t.Context(), diskSlabs)
	if err != nil {
		x.t.Fatalf("%s: check: %v", what, err)
	}
	for _, f := range r.Findings {
		if f.Severity > allowed {
			x.t.Errorf("%s: %v: %s: %s", what, f.Severity, f.Where, f.What)
		}
	}
}

// diskSlabs lets the payload of a test's disk name its slabs: see newDisk.
func diskSlabs(ctx context.Context, o *vmfs.Object) (vmfs.DiskReport, error) {
	h, err := o.Header(ctx)
	if err != nil || o.Kind() != vmfs.KindDisk {
		return vmfs.DiskReport{}, err
	}
	return vmfs.DiskReport{Slabs: decodeDisk(h.Payload).slabs}, nil
}

// tree lists what a volume shows: kind and content by path.
func tree(t *testing.T, v *vmfs.Volume) map[string]string {
	t.Helper()
	root, err := v.Lookup(t.Context(), "/")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	if err := v.Walk(t.Context(), root.Ref, func(path string, info vmfs.Info) error {
		if _, twice := out[path]; twice {
			t.Errorf("%q is listed twice", path)
		}
		out[path] = info.Kind.String()
		switch info.Kind {
		case vmfs.KindFile:
			var b bytes.Buffer
			if err := v.Get(t.Context(), path, &b, nil); err != nil {
				return fmt.Errorf("get %s: %w", path, err)
			}
			out[path] += fmt.Sprintf(" of %d bytes, %08x", b.Len(), crc32.ChecksumIEEE(b.Bytes()))
		case vmfs.KindDisk:
			d, err := v.OpenView(t.Context(), info.Ref)
			if err != nil {
				return err
			}
			h, err := d.Header(t.Context())
			if err != nil {
				return err
			}
			live, err := v.IsLive(t.Context(), decodeDisk(h.Payload).published)
			if err != nil {
				return err
			}
			for _, s := range decodeDisk(h.Payload).slabs {
				b := make([]byte, diskContent)
				if err := v.Device().ReadAt(t.Context(), b, vmfs.SlabOff(s)); err != nil {
					return err
				}
				out[path] += fmt.Sprintf(" %08x", crc32.ChecksumIEEE(b))
			}
			out[path] += fmt.Sprintf(" origin %v, published %v, %d slabs", h.Origin, live, len(decodeDisk(h.Payload).slabs))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func describe(m map[string]string) string {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(m)) {
		fmt.Fprintf(&b, "\n    /%s: %s", k, m[k])
	}
	return b.String()
}

func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7) ^ byte(i>>9) ^ seed
	}
	return b
}

func put(ctx context.Context, v *vmfs.Volume, path string, n int, seed byte) error {
	return v.Put(ctx, path, bytes.NewReader(pattern(n, seed)), nil)
}

func used(t *testing.T, v *vmfs.Volume) int64 {
	t.Helper()
	s, err := v.Space(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s.UsedBytes
}

func is(err error, targets ...error) bool {
	for _, target := range targets {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}
