//go:build e2e

package guest_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"basalt/e2e/guest"
	"basalt/hypervisor"
	"basalt/hypervisor/qmp"
	"basalt/internal/clock"
)

func TestFullStoragePausesTheGuestAndItGoesOn(t *testing.T) {
	nbdkit, err := exec.LookPath("nbdkit")
	if err != nil {
		t.Skip("no nbdkit")
	}
	// nbdkit asks to die with the thread that starts it, and hypervisor.Start throws
	// threads away: this one is kept.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	h := newHost(t)
	full := filepath.Join(h.dir, "full") // while it exists, every write fails
	cmd := exec.Command(nbdkit, "--foreground", "-U", h.socket, "--filter=error", "file", h.disk,
		"error-pwrite=ENOSPC", "error-pwrite-rate=100%", "error-pwrite-file="+full)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // ends as killed
	}()
	h.awaitServer(t)

	vm, console := h.boot(t, guest.Options{Mode: guest.ModeWrite, Count: 200, Blocks: 64, Delay: time.Millisecond})
	readUntil(t, console, func(l guest.Line) bool { return l.Kind == guest.LineAck && l.Seq >= 20 })
	if err := os.WriteFile(full, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	awaitNoSpace(t, vm)
	// Still full: it stops again.
	if err := vm.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitNoSpace(t, vm)
	if err := os.Remove(full); err != nil {
		t.Fatal(err)
	}
	if err := vm.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, acked := readUntil(t, console, isKind(guest.LineDone))
	if _, err := vm.Wait(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if rep := verifyFile(t, h.disk, acked); !rep.OK() || rep.Last != 200 || acked != 200 {
		t.Errorf("acked %d, report %+v; want 200 records and no error in the guest", acked, rep)
	}
}

// awaitNoSpace waits until the guest stands still for want of space.
func awaitNoSpace(t *testing.T, vm *hypervisor.VM) {
	t.Helper()
	late := clock.System{}.NewTimer(30 * time.Second)
	defer late.Stop()
	for noSpace := false; ; {
		select {
		case e, ok := <-vm.Events():
			if !ok {
				t.Fatal("qemu is gone")
			}
			if e.Name == "BLOCK_IO_ERROR" {
				var data struct{ NoSpace bool }
				if err := json.Unmarshal(e.Data, &data); err != nil || !data.NoSpace {
					t.Fatalf("event %s (%v)", e.Data, err)
				}
				noSpace = true
			}
			// STOP may come before or after its cause.
			if state, err := vm.QMP().Status(t.Context()); noSpace && (err != nil || state == qmp.StateIOError) {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
		case <-late.C:
			t.Fatal("the guest did not stop")
		}
	}
}
