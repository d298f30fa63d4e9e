package filedev_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"basalt/block"
	"basalt/block/blocktest"
	"basalt/block/filedev"
)

var (
	_ block.Device = (*filedev.Device)(nil)
	_ block.Fencer = (*filedev.Device)(nil)
)

// newFile makes a file of sizeBytes in a fresh folder of the default temporary
// filesystem.
func newFile(t *testing.T, sizeBytes int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "lun")
	if err := filedev.Create(path, sizeBytes); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, path string, opts filedev.Options) *filedev.Device {
	t.Helper()
	d, err := filedev.Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// shmFile makes a file on tmpfs.
func shmFile(t *testing.T, sizeBytes int64) string {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs("/dev/shm", &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		t.Skip("/dev/shm is not a tmpfs here")
	}
	dir, err := os.MkdirTemp("/dev/shm", "filedev")
	if err != nil {
		t.Skipf("no folder on /dev/shm: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "lun")
	if err := filedev.Create(path, sizeBytes); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConformance(t *testing.T) {
	const size = 16 << 20
	for _, tt := range []struct {
		name string
		file func(*testing.T, int64) string
		opts filedev.Options
	}{
		{"direct", newFile, filedev.Options{}},
		{"direct, blocks of 4096", newFile, filedev.Options{LogicalBytes: 4096}},
		{"buffered", newFile, filedev.Options{Buffered: true}},
		{"buffered, blocks of 512", newFile, filedev.Options{Buffered: true, LogicalBytes: 512}},
		{"tmpfs", shmFile, filedev.Options{}},
		{"tmpfs, buffered, blocks of 512", shmFile, filedev.Options{Buffered: true, LogicalBytes: 512}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device { return open(t, tt.file(t, size), tt.opts) })
			if tt.opts.Buffered {
				return // the shared tests are about locks
			}
			blocktest.RunShared(t, func(t *testing.T) func() block.Device {
				path := tt.file(t, size)
				return func() block.Device { return open(t, path, tt.opts) }
			})
		})
	}
}

func TestCreateNeverTouchesWhatExists(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lun")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := filedev.Create(path, 1<<20); !errors.Is(err, fs.ErrExist) {
		t.Errorf("create over a file: %v, want %v", err, fs.ErrExist)
	}
	if got, _ := os.ReadFile(path); string(got) != "precious" {
		t.Errorf("file now holds %q", got)
	}
}

func TestCreateRefusesSizesThatAreNoDevice(t *testing.T) {
	for _, size := range []int64{-4096, 0, 512, 4097} {
		path := filepath.Join(t.TempDir(), "lun")
		if err := filedev.Create(path, size); !errors.Is(err, block.ErrMisaligned) {
			t.Errorf("create of %d bytes: %v, want %v", size, err, block.ErrMisaligned)
		}
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("create of %d bytes left a file: %v", size, err)
		}
	}
}

func TestCreateLeavesNoFileOnFailure(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lun")
	if err := filedev.Create(path, 1<<61); err == nil { // no Linux filesystem in use here allows it
		t.Skip("the filesystem takes a file of 2 EiB")
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file is still there: %v", err)
	}
}

func TestOpenRefusesWhatIsNoDevice(t *testing.T) {
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		path string
		want error
	}{
		{filepath.Join(dir, "missing"), fs.ErrNotExist},
		{dir, block.ErrNotSupported},
		{"/dev/null", block.ErrNotSupported},
		{fifo, block.ErrNotSupported},
		{empty, block.ErrNotSupported},
	} {
		if d, err := filedev.Open(tt.path, filedev.Options{}); !errors.Is(err, tt.want) {
			t.Errorf("open %s: %v, want %v", tt.path, err, tt.want)
			if err == nil {
				d.Close()
			}
		}
	}
	if _, err := filedev.Open(newFile(t, 1<<20), filedev.Options{LogicalBytes: 1024}); err == nil {
		t.Error("open with LogicalBytes 1024 succeeded")
	}
}

func TestReadOnlyDeviceRefusesChanges(t *testing.T) {
	path := newFile(t, 1<<20)
	rw := open(t, path, filedev.Options{})
	u := rw.Geometry().UnitBytes
	want := bytes.Repeat([]byte{5}, u)
	if err := rw.WriteAt(t.Context(), want, 0); err != nil {
		t.Fatal(err)
	}
	ro := open(t, path, filedev.Options{ReadOnly: true})
	next := make([]byte, u)
	for name, err := range map[string]error{
		"WriteAt":         ro.WriteAt(t.Context(), next, 0),
		"WriteFUA":        ro.WriteFUA(t.Context(), next, 0),
		"WriteZeroes":     ro.WriteZeroes(t.Context(), 0, int64(u)),
		"Discard":         ro.Discard(t.Context(), 0, int64(u)),
		"CompareAndWrite": ro.CompareAndWrite(t.Context(), 0, want, next),
		"Guard":           ro.Guard(t.Context(), 0, 1),
	} {
		if !errors.Is(err, block.ErrNotSupported) {
			t.Errorf("%s: %v, want %v", name, err, block.ErrNotSupported)
		}
	}
	got := make([]byte, u)
	if err := ro.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read: %v, first byte %d, want 5", err, got[0])
	}
	if k := ro.Kinds(); k != 0 {
		t.Errorf("kinds of a read-only device: %v", k)
	}
}

func TestTruncationBehindTheDeviceIsAnError(t *testing.T) {
	for _, opts := range []filedev.Options{{}, {Buffered: true}} {
		for _, end := range []int64{64 << 10, 64<<10 + 100} { // at a block and within one
			path := newFile(t, 1<<20)
			d := open(t, path, opts)
			if err := os.Truncate(path, end); err != nil {
				t.Fatal(err)
			}
			p := block.AlignedBuffer(8192)
			for _, off := range []int64{60 << 10, 64 << 10, 512 << 10} {
				err := d.ReadAt(t.Context(), p, off)
				if !errors.Is(err, block.ErrOutOfRange) || !strings.Contains(err.Error(), path) {
					t.Errorf("%+v: file of %d bytes: read at %d: %v, want %v naming the file", opts, end, off, err, block.ErrOutOfRange)
				}
			}
			if got := d.Geometry().SizeBytes; got != 1<<20 {
				t.Errorf("size became %d, it may only grow", got)
			}
		}
	}
}

func TestGrowthShowsWithoutReopening(t *testing.T) {
	path := newFile(t, 1<<20)
	d := open(t, path, filedev.Options{})
	p := bytes.Repeat([]byte{9}, 4096)
	if err := d.WriteAt(t.Context(), p, 1<<20); !errors.Is(err, block.ErrOutOfRange) {
		t.Fatalf("write past the end: %v, want %v", err, block.ErrOutOfRange)
	}
	if err := os.Truncate(path, 2<<20); err != nil {
		t.Fatal(err)
	}
	if err := d.WriteAt(t.Context(), p, 1<<20); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(p))
	if err := d.ReadAt(t.Context(), got, 1<<20); err != nil || !bytes.Equal(got, p) {
		t.Errorf("read back in the grown part: %v, first byte %d", err, got[0])
	}
	if got := d.Geometry().SizeBytes; got != 2<<20 {
		t.Errorf("size %d, want %d", got, 2<<20)
	}
}

func TestDiscardAndZeroesGiveSpaceBack(t *testing.T) {
	path := newFile(t, 8<<20)
	d := open(t, path, filedev.Options{})
	if d.Geometry().DiscardBytes == 0 {
		t.Skip("the temporary filesystem punches no holes")
	}
	blocks := func() int64 {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks
	}
	for name, give := range map[string]func(context.Context, int64, int64) error{"Discard": d.Discard, "WriteZeroes": d.WriteZeroes} {
		if err := d.WriteAt(t.Context(), bytes.Repeat([]byte{1}, 8<<20), 0); err != nil {
			t.Fatal(err)
		}
		if err := d.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		full := blocks()
		if err := give(t.Context(), 0, 6<<20); err != nil {
			t.Fatal(err)
		}
		if now := blocks(); now > full/2 {
			t.Errorf("%s of 6 of 8 MiB: %d of %d sectors are still allocated", name, now, full)
		}
	}
}
