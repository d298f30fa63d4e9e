package filedev

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"basalt/block"
)

// failFlush makes the next fdatasync of the device fail: it answers EINVAL on a
// descriptor that is a pipe.
func failFlush(t *testing.T, d *Device) (repair func()) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	d.sync.fd = int(r.Fd())
	return func() { d.sync.fd = d.fd }
}

func TestFailedFlushIsSticky(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lun")
	if err := Create(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	d, err := Open(path, Options{Buffered: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	p := block.AlignedBuffer(4096)
	if err := d.WriteAt(t.Context(), p, 0); err != nil {
		t.Fatal(err)
	}
	repair := failFlush(t, d)
	if err := d.Flush(t.Context()); !errors.Is(err, unix.EINVAL) {
		t.Fatalf("flush: %v, want %v", err, unix.EINVAL)
	}
	repair()
	for name, err := range map[string]error{
		"Flush":           d.Flush(t.Context()),
		"WriteFUA":        d.WriteFUA(t.Context(), p, 0),
		"CompareAndWrite": d.CompareAndWrite(t.Context(), 0, p[:d.geo.UnitBytes], p[:d.geo.UnitBytes]),
	} {
		if !errors.Is(err, unix.EINVAL) {
			t.Errorf("%s after the device recovered: %v, want the first failure", name, err)
		}
	}
}

func TestFailedDurableWriteFailsLaterFlushes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lun")
	if err := Create(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	d, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if !d.direct {
		t.Skip("the temporary filesystem has no direct I/O")
	}
	fd := d.fd
	d.fd = -1
	if err := d.WriteFUA(t.Context(), block.AlignedBuffer(4096), 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("durable write: %v, want %v", err, unix.EBADF)
	}
	d.fd = fd
	if err := d.Flush(t.Context()); !errors.Is(err, unix.EBADF) {
		t.Errorf("flush: %v, want the failure of the durable write", err)
	}
}
