package initrd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// metaPackage always depends on Debian's newest kernel for virtual machines.
const metaPackage = "linux-image-cloud-amd64"

var kernelPackage = regexp.MustCompile(`linux-image-[0-9][0-9A-Za-z.+-]*-cloud-amd64`)

// kernel returns the folder of an unpacked kernel package under cacheDir,
// fetching it when there is none. It does not look for a newer one when one is
// there.
func kernel(ctx context.Context, cacheDir string) (string, error) {
	have, err := filepath.Glob(filepath.Join(cacheDir, "linux-image-*", "boot", "vmlinuz-*"))
	if err != nil {
		return "", err
	}
	if len(have) > 0 {
		return filepath.Dir(filepath.Dir(slices.Max(have))), nil
	}
	if err := os.MkdirAll(cacheDir, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(cacheDir, "fetch-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	deps, err := command(ctx, tmp, "apt-cache", "depends", metaPackage)
	if err != nil {
		return "", err
	}
	name := kernelPackage.FindString(deps)
	if name == "" {
		return "", fmt.Errorf("initrd: %s depends on no kernel; is the package list there (apt-get update)?", metaPackage)
	}
	if _, err := command(ctx, tmp, "apt-get", "download", name); err != nil {
		return "", err
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return "", errors.Join(err, fmt.Errorf("initrd: %d packages downloaded for %s", len(debs), name))
	}
	unpacked := filepath.Join(tmp, "unpacked")
	if _, err := command(ctx, tmp, "dpkg-deb", "-x", debs[0], unpacked); err != nil {
		return "", err
	}
	dir := filepath.Join(cacheDir, name)
	if err := os.Rename(unpacked, dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return dir, nil
}

// command runs a tool and returns its output; its words go into the error.
func command(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("initrd: %s: %w: %s", name, err, strings.TrimSpace(stderr.String()))
	}
	return string(out), nil
}

// modules are what the guest needs, in the kernel's spelling. Those that a kernel
// has built in are not among its files and are passed over.
var modules = []string{
	"virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
	"virtio_blk", "rng-core", "virtio-rng", "button", "evdev",
}

// readModules returns the modules' content by file name without compression.
func readModules(ctx context.Context, kernelDir string) (map[string][]byte, error) {
	found := map[string][]byte{}
	walk := func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		stem, suffix, ok := strings.Cut(filepath.Base(path), ".ko")
		if !ok || !slices.Contains(modules, stem) {
			return nil
		}
		content, err := readModule(ctx, path, suffix)
		found[stem+".ko"] = content
		return err
	}
	// Merged-/usr kernels of later releases keep them under usr/lib.
	for _, lib := range []string{"lib/modules", "usr/lib/modules"} {
		if err := filepath.WalkDir(filepath.Join(kernelDir, lib), walk); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	for _, need := range []string{"virtio_pci.ko", "virtio_blk.ko"} {
		if found[need] == nil {
			return nil, fmt.Errorf("initrd: no module %s in %s", need, kernelDir)
		}
	}
	return found, nil
}

func readModule(ctx context.Context, path, suffix string) ([]byte, error) {
	tool := map[string]string{".xz": "xz", ".zst": "zstd", ".gz": "gzip"}[suffix]
	switch {
	case suffix == "":
		return os.ReadFile(path)
	case tool == "":
		return nil, fmt.Errorf("initrd: %s: unknown compression", path)
	}
	out, err := command(ctx, filepath.Dir(path), tool, "-dc", path)
	return []byte(out), err
}
