package lease_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"basalt/block"
	"basalt/block/filedev"
	"basalt/internal/clock"
	"basalt/lease"
)

// holderFile names the LUN of a child process that plays a host; see playHolder.
const holderFile = "BASALT_LEASE_TEST_HOLDER"

func TestMain(m *testing.M) {
	if path := os.Getenv(holderFile); path != "" {
		if err := playHolder(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func realOptions(name string) (lease.Options, error) {
	self, err := filedev.Self()
	return lease.Options{HostName: name, Process: self, Lease: time.Second}, err
}

func claimFile(ctx context.Context, path, name string) (*lease.Session, error) {
	opts, err := realOptions(name)
	if err != nil {
		return nil, err
	}
	dev, err := filedev.Open(path, filedev.Options{})
	if err != nil {
		return nil, err
	}
	s, err := lease.Claim(ctx, dev, dev, clock.System{}, slog.New(slog.DiscardHandler), testArea(4), opts)
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	return s, nil
}

// playHolder claims a slot, says so, and then writes numbers until it is killed.
func playHolder(path string) error {
	ctx := context.Background()
	s, err := claimFile(ctx, path, "holder")
	if err != nil {
		return err
	}
	fmt.Println("claimed", s.Slot(), s.Generation())
	b := block.AlignedBuffer(4096)
	for n := uint64(1); ; n++ {
		binary.LittleEndian.PutUint64(b, n)
		if err := s.Device().WriteAt(ctx, b, dataOff); err != nil {
			return err
		}
	}
}

// startHolder runs playHolder in a child process and waits for its claim.
func startHolder(t *testing.T, path string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(self)
	c.Env = append(os.Environ(), holderFile+"="+path)
	c.Stderr = os.Stderr
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Process.Kill() // it may be dead already
		_ = c.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "claimed 0 1\n" {
		t.Fatalf("%v, holder says %q", err, line)
	}
	return c
}

// A real holder process on a real file is stopped or killed, and broken (design,
// scenario 12).
func TestBreakOfARealProcess(t *testing.T) {
	t.Parallel()
	for name, sig := range map[string]syscall.Signal{"stopped": syscall.SIGSTOP, "killed": syscall.SIGKILL} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
			defer cancel()
			path := formattedFile(ctx, t)
			holder := startHolder(t, path)
			s, err := claimFile(ctx, path, "breaker")
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := s.Close(ctx); err != nil {
					t.Error(err)
				}
			}()
			if err := holder.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			if err := s.Break(ctx, 0, 1); err != nil {
				t.Fatal(err)
			}
			state, err := holder.Process.Wait()
			if err != nil {
				t.Fatal(err)
			}
			if ws, ok := state.Sys().(syscall.WaitStatus); !ok || ws.Signal() != syscall.SIGKILL {
				t.Fatalf("the holder ended with %v", state)
			}
			if dead, err := s.Dead(ctx, 0, 1); err != nil || !dead {
				t.Fatalf("dead %v, %v", dead, err)
			}
			b := block.AlignedBuffer(4096)
			if err := s.Device().ReadAt(ctx, b, dataOff); err != nil || binary.LittleEndian.Uint64(b) == 0 {
				t.Fatalf("%v: the holder has written nothing", err)
			}
		})
	}
}

func formattedFile(ctx context.Context, t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "lun")
	if err := filedev.Create(path, 16<<20); err != nil {
		t.Fatal(err)
	}
	dev, err := filedev.Open(path, filedev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if !dev.Geometry().SharedCAW {
		t.Skip("the temporary directory is on a filesystem without reliable locks")
	}
	if err := errors.Join(lease.Format(ctx, dev, testArea(4)), dev.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}
