package vmfs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"basalt/block"
	"basalt/block/simdev"
	"basalt/internal/clock"
	"basalt/lease"
	"basalt/vmfs"
)

var testVolume = [16]byte{0xba, 0x5a, 0x17, 1}

// newLUN makes a simulated LUN with an empty volume of the given size.
func newLUN(t *testing.T, sizeBytes int64, logical int) *simdev.LUN {
	t.Helper()
	lun := simdev.New(simdev.Options{SizeBytes: sizeBytes, LogicalBytes: logical, Seed: 1})
	dev := lun.Host("mkfs")
	if err := vmfs.Format(t.Context(), dev, clock.System{}, vmfs.FormatOptions{Volume: testVolume, Label: "test", Lease: siteLease}); err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	return lun
}

func mount(t *testing.T, lun *simdev.LUN, host string) *vmfs.Volume {
	t.Helper()
	h := lun.Host(host)
	v, err := vmfs.Mount(t.Context(), h, h, clock.System{}, slog.New(slog.DiscardHandler), vmfs.MountOptions{HostName: host, HostID: [16]byte{1}})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func noDisks(context.Context, *vmfs.Object) (vmfs.DiskReport, error) { return vmfs.DiskReport{}, nil }

// wantClean checks the volume, with nobody mounted, and fails on anything worse
// than the given severity.
func wantClean(t *testing.T, dev block.Device, allowed vmfs.Severity) {
	t.Helper()
	v, err := vmfs.View(t.Context(), dev, clock.System{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := v.Check(t.Context(), noDisks)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range r.Findings {
		if f.Severity > allowed {
			t.Errorf("check: %v: %s: %s", f.Severity, f.Where, f.What)
		}
	}
}

func TestFilesReadBackAcrossMounts(t *testing.T) {
	for _, logical := range []int{512, 4096} {
		t.Run(fmt.Sprint(logical), func(t *testing.T) {
			lun := newLUN(t, 256<<20, logical)
			contents := map[string][]byte{}
			rng := rand.New(rand.NewChaCha8([32]byte{1}))
			a := mount(t, lun, "a")
			if err := a.Mkdir(t.Context(), "/isos"); err != nil {
				t.Fatal(err)
			}
			for i, size := range []int{0, 1, 11000, 12000, 1 << 20, 20<<20 + 7} {
				b := make([]byte, size)
				for i := range b {
					b[i] = byte(rng.Uint32())
				}
				path := fmt.Sprintf("/isos/f%d", i)
				contents[path] = b
				if err := a.Put(t.Context(), path, bytes.NewReader(b), nil); err != nil {
					t.Fatal(err)
				}
			}
			if err := a.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantClean(t, lun.Host("check"), vmfs.Note)
			b := mount(t, lun, "b")
			for path, want := range contents {
				var got bytes.Buffer
				if err := b.Get(t.Context(), path, &got, nil); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got.Bytes(), want) {
					t.Errorf("%s: %d bytes read back differ from the %d written", path, got.Len(), len(want))
				}
				if err := b.Remove(t.Context(), path); err != nil {
					t.Fatal(err)
				}
			}
			s, err := b.Space(t.Context())
			if err != nil || s.UsedBytes != 0 {
				t.Errorf("after removing everything %d bytes are used (%v)", s.UsedBytes, err)
			}
			if err := b.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantClean(t, lun.Host("check"), vmfs.Note)
		})
	}
}

func TestFolderHoldsManyNames(t *testing.T) {
	lun := newLUN(t, 2<<30, 512)
	v := mount(t, lun, "a")
	const n = 400
	long := strings.Repeat("n", 200)
	for i := range n {
		if err := v.Mkdir(t.Context(), fmt.Sprintf("/%s%d", long, i)); err != nil {
			t.Fatal(i, err)
		}
	}
	root, err := v.Lookup(t.Context(), "/")
	if err != nil {
		t.Fatal(err)
	}
	list, err := v.List(t.Context(), root.Ref)
	if err != nil || len(list) != n {
		t.Fatalf("%d names listed, want %d (%v)", len(list), n, err)
	}
	for i := 0; i < n; i += 2 {
		if err := v.Remove(t.Context(), fmt.Sprintf("/%s%d", long, i)); err != nil {
			t.Fatal(i, err)
		}
	}
	if err := v.Rename(t.Context(), "/"+long+"1", "/other"); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Lookup(t.Context(), "/"+long+"1"); !errors.Is(err, vmfs.ErrNotFound) {
		t.Errorf("the old name is found after a rename: %v", err)
	}
	if _, err := v.Lookup(t.Context(), "/other"); err != nil {
		t.Error(err)
	}
	if err := v.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantClean(t, lun.Host("check"), vmfs.Note)
}

func TestHostsCreateAtOnce(t *testing.T) {
	lun := newLUN(t, 1<<30, 512)
	const hosts, each = 4, 12
	var wg sync.WaitGroup
	for h := range hosts {
		v := mount(t, lun, fmt.Sprintf("h%d", h))
		wg.Go(func() {
			for i := range each {
				path := fmt.Sprintf("/f%d-%d", h, i)
				if err := v.Put(t.Context(), path, io.LimitReader(zeros{}, 3<<20), nil); err != nil {
					t.Error(err)
				}
				if i%3 == 0 {
					if err := v.Remove(t.Context(), path); err != nil {
						t.Error(err)
					}
				}
			}
			if err := v.Close(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	wantClean(t, lun.Host("check"), vmfs.Note)
	v := mount(t, lun, "last")
	root, _ := v.Lookup(t.Context(), "/")
	list, err := v.List(t.Context(), root.Ref)
	if want := hosts * (each - each/3); err != nil || len(list) != want {
		t.Errorf("%d files, want %d (%v)", len(list), want, err)
	}
	if err := v.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestSlotIsTakenByOneServerOfAName(t *testing.T) {
	lun := newLUN(t, 128<<20, 512)
	opts := vmfs.MountOptions{HostName: "same", HostID: [16]byte{1}, Server: true}
	h1, h2 := lun.Host("1"), lun.Host("2")
	v, err := vmfs.Mount(t.Context(), h1, h1, clock.System{}, slog.New(slog.DiscardHandler), opts)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := vmfs.Mount(t.Context(), h2, h2, clock.System{}, slog.New(slog.DiscardHandler), opts); !errors.Is(err, lease.ErrNameInUse) {
		t.Errorf("second server of one name: %v", err)
	}
	if err := v.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}
