package filedev

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"basalt/block"
)

func TestCloseEndsAWaitForAHeldUnit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lun")
	if err := Create(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	d, err := Open(path, Options{CAWWait: 20 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if !d.geo.SharedCAW {
		t.Skip("the temporary filesystem is not a known local one")
	}
	other, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	u := d.geo.UnitBytes
	if err := setLock(int(other.Fd()), unix.F_WRLCK, 0, int64(u)); err != nil {
		t.Fatal(err)
	}
	results := make(chan error, 2)
	for range cap(results) { // one waits for the other process, one for the first
		go func() {
			results <- d.CompareAndWrite(context.Background(), 0, make([]byte, u), make([]byte, u))
		}()
	}
	for held := 0; held == 0; { // ends with the test binary's deadline at worst
		runtime.Gosched()
		d.units.mu.Lock()
		held = len(d.units.held)
		d.units.mu.Unlock()
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	for range cap(results) {
		if err := <-results; !errors.Is(err, block.ErrClosed) {
			t.Errorf("%v, want %v", err, block.ErrClosed)
		}
	}
}
