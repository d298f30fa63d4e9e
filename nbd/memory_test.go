package nbd_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"basalt/internal/clock"
	"basalt/nbd"
)

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

// grace is how long a test gives the server to do what it must not do.
const grace = 100 * time.Millisecond

// disk is an export in memory with a volatile cache: durable holds what a power
// cut would leave.
type disk struct {
	info    nbd.Info
	extents []nbd.Extent // what BlockStatus tells, from offset 0; nil: one of data

	forgetful bool  // ops is not kept
	closeErr  error // what Close returns

	// before, if set, runs at the start of each operation, without locks.
	before func(ctx context.Context, op string, offBytes int64) error

	mu       sync.Mutex // guards what follows
	data     []byte
	durable  []byte
	ops      []string
	running  int
	peak     int
	opens    int
	closes   int
	closedIn int // operations that were running at a Close
}

func newDisk(sizeBytes int) *disk {
	return &disk{
		info:    nbd.Info{SizeBytes: int64(sizeBytes)},
		data:    make([]byte, sizeBytes),
		durable: make([]byte, sizeBytes),
	}
}

func (d *disk) begin(ctx context.Context, op string, offBytes int64) (end func(), err error) {
	d.mu.Lock()
	if !d.forgetful {
		d.ops = append(d.ops, op)
	}
	d.running++
	d.peak = max(d.peak, d.running)
	d.mu.Unlock()
	if d.before != nil {
		err = d.before(ctx, op, offBytes)
	}
	d.mu.Lock()
	return func() {
		d.running--
		d.mu.Unlock()
	}, err
}

func (d *disk) Info() nbd.Info { return d.info }

func (d *disk) ReadAt(ctx context.Context, p []byte, offBytes int64) error {
	end, err := d.begin(ctx, "read", offBytes)
	defer end()
	if err == nil {
		copy(p, d.data[offBytes:])
	}
	return err
}

func (d *disk) WriteAt(ctx context.Context, p []byte, offBytes int64) error {
	end, err := d.begin(ctx, "write", offBytes)
	defer end()
	if err == nil {
		copy(d.data[offBytes:], p)
	}
	return err
}

func (d *disk) WriteFUA(ctx context.Context, p []byte, offBytes int64) error {
	end, err := d.begin(ctx, "write fua", offBytes)
	defer end()
	if err == nil {
		copy(d.data[offBytes:], p)
		copy(d.durable[offBytes:], p)
	}
	return err
}

func (d *disk) Flush(ctx context.Context) error {
	end, err := d.begin(ctx, "flush", 0)
	defer end()
	if err == nil {
		copy(d.durable, d.data)
	}
	return err
}

func (d *disk) Trim(ctx context.Context, offBytes, lenBytes int64) error {
	end, err := d.begin(ctx, "trim", offBytes)
	defer end()
	if err == nil {
		clear(d.data[offBytes : offBytes+lenBytes])
	}
	return err
}

func (d *disk) WriteZeroes(ctx context.Context, offBytes, lenBytes int64, o nbd.ZeroOptions) error {
	end, err := d.begin(ctx, fmt.Sprintf("zero %+v", o), offBytes)
	defer end()
	if err == nil {
		clear(d.data[offBytes : offBytes+lenBytes])
		if o.FUA {
			clear(d.durable[offBytes : offBytes+lenBytes])
		}
	}
	return err
}

func (d *disk) BlockStatus(ctx context.Context, offBytes, lenBytes int64, emit func(nbd.Extent) bool) error {
	end, err := d.begin(ctx, "block status", offBytes)
	defer end()
	if err != nil {
		return err
	}
	if d.extents == nil {
		emit(nbd.Extent{LenBytes: lenBytes})
		return nil
	}
	at := int64(0)
	for _, x := range d.extents {
		skip := min(max(0, offBytes-at), x.LenBytes)
		at += x.LenBytes
		if skip > 0 && skip == x.LenBytes {
			continue
		}
		x.LenBytes -= skip
		if !emit(x) {
			break
		}
	}
	return nil
}

func (d *disk) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closes++
	d.closedIn += d.running
	return d.closeErr
}

// look reads the disk's state under its lock.
func (d *disk) look(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
}

func (d *disk) did() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.ops)
}

// disks are exports by name. opening, if set, runs at the start of each Open.
type disks struct {
	byName  map[string]*disk
	failing map[string]error
	opening func(ctx context.Context) error
}

func (s *disks) List(context.Context) ([]string, error) {
	var names []string
	for n := range s.byName {
		names = append(names, n)
	}
	slices.Sort(names)
	return names, nil
}

func (s *disks) Describe(_ context.Context, name string) (nbd.Info, error) {
	d, err := s.find(name)
	if err != nil {
		return nbd.Info{}, err
	}
	return d.info, nil
}

func (s *disks) find(name string) (*disk, error) {
	if err := s.failing[name]; err != nil {
		return nil, err
	}
	d := s.byName[name]
	if d == nil {
		return nil, fmt.Errorf("disk %q: %w", name, nbd.ErrNotFound)
	}
	return d, nil
}

func (s *disks) Open(ctx context.Context, name string) (nbd.Export, error) {
	if s.opening != nil {
		if err := s.opening(ctx); err != nil {
			return nil, err
		}
	}
	d, err := s.find(name)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.opens++
	return d, nil
}

func one(d *disk) *disks { return &disks{byName: map[string]*disk{"d": d}} }

func newServer(t testing.TB, e nbd.Exports, opts nbd.Options) *nbd.Server {
	t.Helper()
	s, err := nbd.New(e, clock.System{}, slog.New(slog.NewTextHandler(io.Discard, nil)), opts)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// listen serves e on a unix socket until the test ends and returns its path.
func listen(t testing.TB, e nbd.Exports, opts nbd.Options) string {
	t.Helper()
	s := newServer(t, e, opts)
	path, served := serve(t, context.Background(), s)
	t.Cleanup(func() {
		if err := s.Shutdown(context.Background()); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return path
}

func serve(t testing.TB, ctx context.Context, s *nbd.Server) (path string, served <-chan error) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c := make(chan error, 1)
	go func() { c <- s.Serve(ctx, l) }()
	return path, c
}

// within waits for an event that must happen.
func within[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	timer := clock.System{}.NewTimer(patience)
	defer timer.Stop()
	select {
	case v := <-c:
		return v
	case <-timer.C:
		t.Fatalf("%s did not happen within %v", what, patience)
		panic("unreachable")
	}
}
