package filedev_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"basalt/block"
	"basalt/block/blocktest"
	"basalt/block/filedev"
)

// mountSmall mounts a filesystem of 8 MiB.
func mountSmall(t *testing.T, kind string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	switch kind {
	case "tmpfs":
		if err := unix.Mount("none", dir, "tmpfs", 0, "size=8m"); err != nil {
			t.Skipf("mount a tmpfs: %v", err)
		}
	case "ext4":
		dev := attachLoop(t, 16<<20)
		if out, err := exec.Command("mkfs.ext4", "-q", "-m", "0", dev).CombinedOutput(); err != nil {
			t.Skipf("mkfs.ext4: %v: %s", err, out)
		}
		if err := unix.Mount(dev, dir, "ext4", 0, ""); err != nil {
			t.Skipf("mount ext4 from %s: %v", dev, err)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// attachLoop makes a loop device over a fresh file.
func attachLoop(t *testing.T, sizeBytes int64) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("loop devices need root")
	}
	image := newFile(t, sizeBytes)
	out, err := exec.Command("losetup", "--find", "--show", image).CombinedOutput()
	if err != nil {
		t.Skipf("losetup: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v: %s", dev, err, out)
		}
	})
	return dev
}

func TestFullFilesystemIsErrNoSpace(t *testing.T) {
	for _, kind := range []string{"tmpfs", "ext4"} {
		t.Run(kind, func(t *testing.T) {
			path := filepath.Join(mountSmall(t, kind), "lun")
			if err := filedev.Create(path, 64<<20); err != nil {
				t.Fatal(err)
			}
			d, err := filedev.Open(path, filedev.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close() // before the unmount, which runs at cleanup
			const step = 1 << 20
			p := bytes.Repeat([]byte{1}, step)
			var full error
			written := int64(0)
			for ; full == nil && written < 64<<20; written += step {
				full = d.WriteAt(t.Context(), p, written)
			}
			if !errors.Is(full, block.ErrNoSpace) {
				t.Fatalf("after %d bytes: %v, want %v", written, full, block.ErrNoSpace)
			}
			if err := d.WriteFUA(t.Context(), p, 60<<20); !errors.Is(err, block.ErrNoSpace) {
				t.Errorf("durable write: %v, want %v", err, block.ErrNoSpace)
			}
			if err := d.Flush(t.Context()); err != nil {
				t.Errorf("flush of what was written: %v", err)
			}
			if err := d.WriteZeroes(t.Context(), 0, 2*step); err != nil {
				t.Fatalf("zeroing a full filesystem: %v", err)
			}
			if err := d.WriteFUA(t.Context(), p, 0); err != nil {
				t.Errorf("write after space came back: %v", err)
			}
			got := make([]byte, 2*step)
			if err := d.ReadAt(t.Context(), got, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got[:step], p) || !bytes.Equal(got[step:], make([]byte, step)) {
				t.Error("the first MiB or the zeroed second one reads back wrong")
			}
		})
	}
}

func TestBlockDevice(t *testing.T) {
	dev := attachLoop(t, 16<<20)
	t.Run("conformance", func(t *testing.T) {
		blocktest.Run(t, func(t *testing.T) block.Device { return open(t, dev, filedev.Options{}) })
	})
	t.Run("one writer for each kernel", func(t *testing.T) {
		first := open(t, dev, filedev.Options{})
		if d, err := filedev.Open(dev, filedev.Options{}); !errors.Is(err, block.ErrBusy) {
			t.Errorf("second writer: %v, want %v", err, block.ErrBusy)
			if err == nil {
				d.Close()
			}
		}
		open(t, dev, filedev.Options{ReadOnly: true})
		if first.Geometry().SharedCAW || first.Kinds() != block.FenceExclusive {
			t.Error("a block device claims locks that other kernels can see")
		}
		if err := first.Guard(t.Context(), 0, 1); err != nil {
			t.Errorf("guard: %v", err)
		}
	})
	t.Run("an earlier writer of this machine is gone, another's is not known", func(t *testing.T) {
		d := open(t, dev, filedev.Options{})
		self, err := filedev.Self()
		if err != nil {
			t.Fatal(err)
		}
		machine, err := filedev.MachineID()
		if err != nil {
			t.Fatal(err)
		}
		h := block.Holder{Slot: 3, Generation: 1, HostID: machine, Process: self, Fencers: block.FenceExclusive}
		if gone, err := d.Gone(t.Context(), h); err != nil || !gone {
			t.Errorf("an earlier process of this boot: gone %v, %v", gone, err)
		}
		h.Process.BootID[0] ^= 1
		if gone, err := d.Gone(t.Context(), h); err != nil || gone {
			t.Errorf("an earlier boot: gone %v, %v", gone, err)
		}
		if err := d.Fence(t.Context(), h); err != nil {
			t.Errorf("fence of an earlier boot: %v", err)
		}
		h.HostID[0] ^= 1
		if err := d.Fence(t.Context(), h); !errors.Is(err, block.ErrNotSupported) {
			t.Errorf("fence of another machine's holder: %v", err)
		}
	})
}
