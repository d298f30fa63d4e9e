// Package initrd makes what a test guest boots from: a Debian cloud kernel and an
// initrd of the guest's /init (e2e/guest/guestinit), the kernel's virtio modules
// and, if the host has a static one, busybox. It needs apt-get, dpkg-deb and the
// go tool, but neither root nor cpio. It makes no disk images.
//
// Invariants: files appear whole or not at all, so tests in parallel processes may
// share a cache folder; equal inputs give equal bytes.
package initrd

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

// Image is what a guest boots from.
type Image struct {
	Kernel string // path of the kernel, for QEMU's -kernel
	Initrd string // path of the gzipped cpio archive
}

// guestInit is the package of the guest's /init.
const guestInit = "basalt/e2e/guest/guestinit"

// Build makes or refreshes the image in cacheDir. It downloads the kernel's
// package once; with that in place it takes well under a second. The go tool
// must find module basalt from the working directory.
func Build(ctx context.Context, cacheDir string) (Image, error) {
	cacheDir, err := filepath.Abs(cacheDir)
	if err != nil {
		return Image{}, err
	}
	kernelDir, err := kernel(ctx, cacheDir)
	if err != nil {
		return Image{}, err
	}
	vmlinuz, err := filepath.Glob(filepath.Join(kernelDir, "boot", "vmlinuz-*"))
	if err != nil || len(vmlinuz) == 0 {
		return Image{}, errors.Join(err, fmt.Errorf("initrd: no kernel in %s", kernelDir))
	}
	mods, err := readModules(ctx, kernelDir)
	if err != nil {
		return Image{}, err
	}
	program, err := buildInit(ctx, cacheDir)
	if err != nil {
		return Image{}, err
	}
	packed, err := pack(program, mods)
	if err != nil {
		return Image{}, err
	}
	img := Image{Kernel: vmlinuz[0], Initrd: filepath.Join(cacheDir, "initrd.gz")}
	return img, replace(img.Initrd, packed)
}

func buildInit(ctx context.Context, cacheDir string) ([]byte, error) {
	tmp, err := os.MkdirTemp(cacheDir, "init-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	out := filepath.Join(tmp, "init")
	wd, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	if _, err := command(ctx, wd, "env", "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64",
		"go", "build", "-trimpath", "-ldflags=-s -w", "-buildvcs=false", "-o", out, guestInit); err != nil {
		return nil, err
	}
	return os.ReadFile(out)
}

func pack(program []byte, mods map[string][]byte) ([]byte, error) {
	var buf bytes.Buffer
	// The archive is small and read once; a better level costs more than it saves.
	zip, err := gzip.NewWriterLevel(&buf, gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	a := &archive{w: zip}
	for _, dir := range []string{"dev", "proc", "sys", "bin", "lib", "lib/modules"} {
		a.add(entry{name: dir, mode: modeDir})
	}
	// The kernel opens it for init before init mounts /dev.
	a.add(entry{name: "dev/console", mode: modeChar, major: 5, minor: 1})
	a.add(entry{name: "init", mode: modeExec, content: program})
	for _, name := range slices.Sorted(maps.Keys(mods)) {
		a.add(entry{name: "lib/modules/" + name, mode: modeFile, content: mods[name]})
	}
	if shell := staticBusybox(); shell != nil {
		a.add(entry{name: "bin/busybox", mode: modeExec, content: shell})
	}
	if err := errors.Join(a.close(), zip.Close()); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

// staticBusybox returns the host's busybox if it runs without libraries.
func staticBusybox() []byte {
	for _, path := range []string{"/bin/busybox", "/usr/bin/busybox"} {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		f, err := elf.NewFile(bytes.NewReader(b))
		if err == nil && f.Section(".interp") == nil {
			return b
		}
	}
	return nil
}

// replace makes path hold content, and leaves it alone when it already does.
func replace(path string, content []byte) error {
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, content) {
		return nil
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".initrd-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(content)
	if err := errors.Join(err, tmp.Chmod(0o644), tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}
