package hypervisor_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"basalt/hypervisor"
	"basalt/hypervisor/qmp"
	"basalt/internal/clock"
)

// starterEnv makes the test binary a starter that dies right after Start.
const starterEnv = "BASALT_TEST_STARTER"

func TestMain(m *testing.M) {
	if runDir := os.Getenv(starterEnv); runDir != "" {
		vm, err := hypervisor.Start(context.Background(), clock.System{}, slog.Default(), idleSpec(runDir), idleOptions)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(vm.PID())
		os.Exit(0)
	}
	os.Exit(m.Run())
}

var idleOptions = hypervisor.Options{ForceTCG: true}

// idleSpec is a VM without disks: its firmware finds nothing to boot.
func idleSpec(runDir string) hypervisor.Spec {
	s := hypervisor.Spec{Name: "idle", MemoryMiB: 32, VCPUs: 1, RunDir: runDir, UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}
	if s.UID == 0 {
		s.UID, s.GID = 2000018, 2000018
	}
	return s
}

// newRunDir is not below t.TempDir, whose names outgrow socket addresses.
func newRunDir(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("no qemu-system-x86_64")
	}
	dir, err := os.MkdirTemp("", "hv")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := hypervisor.KillRunDir(ctx, filepath.Join(dir, "run")); err != nil && !errors.Is(err, hypervisor.ErrNotRunning) {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	return filepath.Join(dir, "run")
}

// soon is a context for what takes milliseconds when all is well.
func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func start(t *testing.T, runDir string) *hypervisor.VM {
	t.Helper()
	vm, err := hypervisor.Start(soon(t), clock.System{}, slog.New(slog.DiscardHandler), idleSpec(runDir), idleOptions)
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

func attach(t *testing.T, runDir string) (*hypervisor.VM, error) {
	t.Helper()
	return hypervisor.Attach(soon(t), clock.System{}, slog.New(slog.DiscardHandler), runDir)
}

func status(t *testing.T, vm *hypervisor.VM) qmp.RunState {
	t.Helper()
	s, err := vm.QMP().Status(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestPauseResumeStop(t *testing.T) {
	vm := start(t, newRunDir(t))
	defer vm.Close()
	if s := status(t, vm); s != qmp.StateRunning {
		t.Errorf("after Start: %s", s)
	}
	if err := vm.Pause(soon(t)); err != nil {
		t.Fatal(err)
	}
	if s := status(t, vm); s != qmp.StatePaused {
		t.Errorf("after Pause: %s", s)
	}
	if err := vm.Resume(soon(t)); err != nil {
		t.Fatal(err)
	}
	if err := vm.Stop(soon(t)); err != nil {
		t.Fatal(err)
	}
	var names []string
	for e := range vm.Events() { // until the monitor is gone
		names = append(names, e.Name)
	}
	if got := strings.Join(names, " "); !strings.HasPrefix(got, "RESUME STOP RESUME SHUTDOWN") {
		t.Errorf("events %s", got)
	}
	if exit, err := vm.Wait(soon(t)); err != nil || exit != (hypervisor.Exit{Known: true}) {
		t.Errorf("exit %v, %v", exit, err)
	}
}

func TestSecondStartIsRefusedAndHarmsNothing(t *testing.T) {
	runDir := newRunDir(t)
	vm := start(t, runDir)
	defer vm.Close()
	if _, err := hypervisor.Start(soon(t), clock.System{}, slog.New(slog.DiscardHandler), idleSpec(runDir), idleOptions); !errors.Is(err, hypervisor.ErrRunning) {
		t.Errorf("second start: %v; want ErrRunning", err)
	}
	if s := status(t, vm); s != qmp.StateRunning {
		t.Errorf("the first is %s", s)
	}
}

func TestGuestThatIgnoresThePowerButtonIsCutOff(t *testing.T) {
	vm := start(t, newRunDir(t))
	defer vm.Close()
	if err := vm.Shutdown(soon(t), 0); !errors.Is(err, hypervisor.ErrForced) {
		t.Errorf("shutdown: %v; want ErrForced", err)
	}
	if exit, err := vm.Wait(soon(t)); err != nil || !exit.Known {
		t.Errorf("exit %v, %v", exit, err)
	}
}

func TestVMOutlivesItsStarter(t *testing.T) {
	runDir := newRunDir(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), starterEnv+"="+runDir)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	vm, err := attach(t, runDir)
	if err != nil {
		t.Fatal(err)
	}
	if strconv.Itoa(vm.PID()) != strings.TrimSpace(string(out)) || vm.Name() != "idle" || vm.Accel() != (hypervisor.Accel{Kind: hypervisor.TCG, Reason: "asked for"}) {
		t.Errorf("found %d %q %v; started %s", vm.PID(), vm.Name(), vm.Accel(), out)
	}
	if s := status(t, vm); s != qmp.StateRunning {
		t.Errorf("state %s", s)
	}
	// A second reader comes in once the first let go.
	if err := vm.Close(); err != nil {
		t.Fatal(err)
	}
	vm, err = attach(t, runDir)
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close()
	if err := vm.Kill(); err != nil {
		t.Fatal(err)
	}
	if exit, err := vm.Wait(soon(t)); err != nil || exit.Known {
		t.Errorf("exit %v, %v; want an unknown status, as it was not our child", exit, err)
	}
	if _, err := attach(t, runDir); !errors.Is(err, hypervisor.ErrNotRunning) {
		t.Errorf("attach after the end: %v", err)
	}
}

func TestHalfStartedQEMUIsEndedByAttach(t *testing.T) {
	runDir := newRunDir(t)
	vm := start(t, runDir)
	pid := vm.PID()
	// As if the starter had died before it wrote the record.
	if err := os.Remove(filepath.Join(runDir, "vm.json")); err != nil {
		t.Fatal(err)
	}
	if err := vm.QMP().Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := attach(t, runDir); !errors.Is(err, hypervisor.ErrNotRunning) {
		t.Errorf("attach: %v; want ErrNotRunning", err)
	}
	if _, err := vm.Wait(soon(t)); err != nil {
		t.Fatal(err)
	}
	if err := vm.Close(); err != nil {
		t.Error(err)
	}
	if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("process %d is left (%v)", pid, err)
	}
}

func TestFailedStartLeavesNothingAndSaysWhy(t *testing.T) {
	runDir := newRunDir(t)
	spec := idleSpec(runDir)
	nbdDir := filepath.Join(filepath.Dir(runDir), "nbd")
	if err := os.Mkdir(nbdDir, 0o755); err != nil {
		t.Fatal(err)
	}
	spec.Disks = []hypervisor.Disk{{Socket: filepath.Join(nbdDir, "absent"), Export: "x"}}
	_, err := hypervisor.Start(soon(t), clock.System{}, slog.New(slog.DiscardHandler), spec, idleOptions)
	if err == nil || !strings.Contains(err.Error(), "No such file or directory") {
		t.Errorf("start: %v; want QEMU's own words", err)
	}
	if _, err := attach(t, runDir); !errors.Is(err, hypervisor.ErrNotRunning) {
		t.Errorf("attach: %v", err)
	}
	vm := start(t, runDir) // the folder is free again
	vm.Close()
}

func TestStartThatIsCalledOffLeavesNothing(t *testing.T) {
	runDir := newRunDir(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := hypervisor.Start(ctx, clock.System{}, slog.New(slog.DiscardHandler), idleSpec(runDir), idleOptions)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("start: %v", err)
	}
	if _, err := attach(t, runDir); !errors.Is(err, hypervisor.ErrNotRunning) {
		t.Errorf("attach: %v", err)
	}
}

func TestKillRunDirNeedsNoMonitor(t *testing.T) {
	runDir := newRunDir(t)
	vm := start(t, runDir) // holds the monitor, as a stuck starter would
	defer vm.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := hypervisor.Attach(ctx, clock.System{}, slog.New(slog.DiscardHandler), runDir); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("attach while the monitor is held: %v", err)
	}
	if err := hypervisor.KillRunDir(soon(t), runDir); err != nil {
		t.Fatal(err)
	}
	if _, err := attach(t, runDir); !errors.Is(err, hypervisor.ErrNotRunning) {
		t.Errorf("attach: %v", err)
	}
}
