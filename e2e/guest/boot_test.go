//go:build e2e

package guest_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"basalt/e2e/guest"
	"basalt/e2e/guest/initrd"
	"basalt/hypervisor"
	"basalt/internal/clock"
)

const vmUser = 2000017

// host is a disk file served by qemu-nbd and what a VM on it needs.
type host struct {
	img    initrd.Image
	dir    string
	disk   string
	socket string
}

func newHost(t *testing.T) host {
	t.Helper()
	for _, tool := range []string{"qemu-system-x86_64", "qemu-nbd"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("no %s", tool)
		}
	}
	if os.Geteuid() != 0 {
		t.Skip("confinement needs root")
	}
	img, err := initrd.Build(t.Context(), filepath.Join("..", "..", ".cache", "guest"))
	if err != nil {
		t.Skipf("no test guest: %v", err)
	}
	// Not t.TempDir: a socket address holds 107 bytes.
	dir, err := os.MkdirTemp("", "hv")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	h := host{img: img, dir: dir, disk: filepath.Join(dir, "disk.raw"), socket: filepath.Join(dir, "nbd", "s")}
	if err := os.Mkdir(filepath.Dir(h.socket), 0o711); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(h.disk)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(64<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	return h
}

// serve runs the NBD server until the returned function, which ends it and waits.
func (h host) serve(t *testing.T) (stop func()) {
	t.Helper()
	// A server that was killed leaves its socket, and qemu-nbd will not replace it.
	if err := os.Remove(h.socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	pidFile := h.socket + ".pid"
	cmd := exec.Command("qemu-nbd", "--persistent", "-f", "raw", "--cache=none", "-k", h.socket, "-x", "lun", "--pid-file="+pidFile, h.disk)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	h.awaitServer(t)
	return func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // ends as killed
	}
}

// awaitServer waits for the NBD server and gives its socket to the VM.
func (h host) awaitServer(t *testing.T) {
	t.Helper()
	clk := clock.System{}
	for deadline := clk.Now().Add(10 * time.Second); clk.Now() < deadline; {
		conn, err := net.Dial("unix", h.socket)
		if err == nil {
			if err := errors.Join(conn.Close(), os.Chown(h.socket, vmUser, vmUser)); err != nil {
				t.Fatal(err)
			}
			return
		}
		<-clk.NewTimer(5 * time.Millisecond).C
	}
	t.Fatalf("no server at %s", h.socket)
}

func (h host) spec(opts guest.Options) hypervisor.Spec {
	return hypervisor.Spec{
		Name: "guest-1", MemoryMiB: 192, VCPUs: 1, UID: vmUser, GID: vmUser,
		RunDir: filepath.Join(h.dir, "run"), NoReboot: true,
		Boot:  hypervisor.Boot{Kernel: h.img.Kernel, Initrd: h.img.Initrd, Append: "console=ttyS0 quiet panic=-1 " + opts.String()},
		Disks: []hypervisor.Disk{{Socket: h.socket, Export: "lun", Serial: "disk0"}},
	}
}

// boot starts a guest whose console is read from its first byte.
func (h host) boot(t *testing.T, opts guest.Options) (*hypervisor.VM, *guest.Console) {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	vm, err := hypervisor.Start(t.Context(), clock.System{}, log, h.spec(opts), hypervisor.Options{Paused: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(vm.Kill(), vm.Close()); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	conn, err := net.Dial("unix", vm.ConsolePath())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetReadDeadline(clock.System{}.Wall().Add(90 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := vm.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	return vm, guest.NewConsole(conn)
}

// readUntil reads the console until a line of the given kind, and returns it and
// the newest acknowledged record.
func readUntil(t *testing.T, c *guest.Console, stop func(guest.Line) bool) (last guest.Line, acked uint64) {
	t.Helper()
	for {
		line, err := c.Next()
		if err != nil {
			t.Fatalf("console: %v (acked %d)", err, acked)
		}
		switch line.Kind {
		case guest.LineAck:
			acked = line.Seq
		case guest.LineBad, guest.LineError:
			t.Fatalf("guest says %q", line)
		}
		if stop(line) {
			return line, acked
		}
	}
}

func isKind(k guest.Kind) func(guest.Line) bool {
	return func(l guest.Line) bool { return l.Kind == k }
}

func verifyFile(t *testing.T, path string, acked uint64) guest.Report {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rep, err := guest.Verify(f, acked)
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestConfinedGuestWritesAndTheDiskProvesIt(t *testing.T) {
	h := newHost(t)
	defer h.serve(t)()
	vm, console := h.boot(t, guest.Options{Mode: guest.ModeWrite, Count: 100, Blocks: 64})
	if !vm.Confined() {
		t.Error("a root starter must confine")
	}
	checkConfinement(t, vm.PID())
	_, acked := readUntil(t, console, isKind(guest.LineDone))
	if exit, err := vm.Wait(deadline(t)); err != nil || !exit.Known || exit.Code != 0 || exit.Signal != 0 {
		t.Fatalf("exit %v, %v; want a clean power-off", exit, err)
	}
	if _, err := hypervisor.Attach(t.Context(), clock.System{}, slog.Default(), filepath.Join(h.dir, "run")); !errors.Is(err, hypervisor.ErrNotRunning) {
		t.Errorf("attach after power-off: %v; want ErrNotRunning", err)
	}
	rep := verifyFile(t, h.disk, acked)
	if !rep.OK() || rep.Last != 100 || acked != 100 {
		t.Fatalf("acked %d, report %+v; want 100 records", acked, rep)
	}
}

// checkConfinement reads what the kernel says of a running QEMU.
func checkConfinement(t *testing.T, pid int) {
	t.Helper()
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	id := strconv.Itoa(vmUser)
	for key, want := range map[string]string{
		"Uid": id + " " + id + " " + id + " " + id, "Gid": id + " " + id + " " + id + " " + id, "Groups": "",
		"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000",
		"CapBnd": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2",
	} {
		if got := statusField(string(status), key); got != want {
			t.Errorf("%s is %q; want %q", key, got, want)
		}
	}
	for _, ns := range []string{"net", "mnt", "ipc", "uts"} {
		theirs, err1 := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/" + ns)
		ours, err2 := os.Readlink("/proc/self/ns/" + ns)
		if err := errors.Join(err1, err2); err != nil || theirs == ours {
			t.Errorf("namespace %s is shared (%v)", ns, err)
		}
	}
	root := "/proc/" + strconv.Itoa(pid) + "/root"
	for _, hidden := range []string{"/etc/passwd", "/root", "/proc/self", "/sys/kernel", "/dev/vda", "/dev/kvm"} {
		if _, err := os.Stat(root + hidden); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("QEMU can see %s (%v)", hidden, err)
		}
	}
	if err := os.WriteFile(root+"/usr/intruder", nil, 0o644); err == nil {
		t.Error("QEMU's /usr is writable")
	}
}

func TestGuestObeysThePowerButton(t *testing.T) {
	h := newHost(t)
	defer h.serve(t)()
	vm, console := h.boot(t, guest.Options{Mode: guest.ModeWrite, Blocks: 64, Delay: time.Millisecond})
	_, acked := readUntil(t, console, func(l guest.Line) bool { return l.Kind == guest.LineAck && l.Seq >= 20 })
	ended := make(chan error, 1)
	go func() { ended <- vm.Shutdown(deadline(t), 30*time.Second) }()
	_, more := readUntil(t, console, isKind(guest.LineDone))
	acked = max(acked, more)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if rep := verifyFile(t, h.disk, acked); !rep.OK() || rep.Last != acked || rep.Torn {
		t.Errorf("acked %d, report %+v", acked, rep)
	}
}

func TestAcknowledgedRecordsSurviveKilledGuests(t *testing.T) {
	h := newHost(t)
	defer h.serve(t)()
	var acked uint64
	for round := range uint64(2) {
		vm, console := h.boot(t, guest.Options{Mode: guest.ModeWrite, Acked: acked, Blocks: 64})
		verified, _ := readUntil(t, console, isKind(guest.LineVerified))
		if verified.Seq < acked {
			t.Fatalf("round %d: the guest found %d records of %d", round, verified.Seq, acked)
		}
		_, acked = readUntil(t, console, func(l guest.Line) bool { return l.Kind == guest.LineAck && l.Seq >= 150*(round+1) })
		if err := vm.Kill(); err != nil {
			t.Fatal(err)
		}
		if exit, err := vm.Wait(deadline(t)); err != nil || !exit.Known || exit.Signal != syscall.SIGKILL {
			t.Fatalf("exit %v, %v", exit, err)
		}
		if rep := verifyFile(t, h.disk, acked); !rep.OK() || rep.Last < acked {
			t.Fatalf("round %d: acked %d, report %+v", round, acked, rep)
		}
	}
}

func TestGuestWaitsOutAKilledStorageServer(t *testing.T) {
	h := newHost(t)
	stop := h.serve(t)
	vm, console := h.boot(t, guest.Options{Mode: guest.ModeWrite, Count: 300, Blocks: 64, Delay: 2 * time.Millisecond})
	_, before := readUntil(t, console, func(l guest.Line) bool { return l.Kind == guest.LineAck && l.Seq >= 50 })
	stop()
	defer h.serve(t)()
	_, acked := readUntil(t, console, isKind(guest.LineDone))
	if acked != 300 || before >= 300 {
		t.Errorf("acked %d before, %d in all; want 300", before, acked)
	}
	if _, err := vm.Wait(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if rep := verifyFile(t, h.disk, acked); !rep.OK() || rep.Last != 300 {
		t.Errorf("report %+v", rep)
	}
	for e := range vm.Events() {
		if e.Name == "BLOCK_IO_ERROR" {
			t.Errorf("the outage reached the guest: %s", e.Data)
		}
	}
}

func TestConsoleFileHoldsTheWholeBoot(t *testing.T) {
	h := newHost(t)
	defer h.serve(t)()
	spec := h.spec(guest.Options{Mode: guest.ModeVerify, Blocks: 64})
	spec.Console = hypervisor.ConsoleFile
	vm, err := hypervisor.Start(t.Context(), clock.System{}, slog.New(slog.DiscardHandler), spec, hypervisor.Options{ForceTCG: true})
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close()
	if _, err := vm.Wait(deadline(t)); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(vm.ConsolePath())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	console := guest.NewConsole(f)
	readUntil(t, console, isKind(guest.LineReady))
	if line, _ := readUntil(t, console, isKind(guest.LineVerified)); line.Seq != 0 {
		t.Errorf("an empty disk verifies as %q", line)
	}
	readUntil(t, console, isKind(guest.LineDone))
}

func TestOnlyKillEndsAGuestWhoseStorageIsGone(t *testing.T) {
	h := newHost(t)
	stop := h.serve(t)
	vm, console := h.boot(t, guest.Options{Mode: guest.ModeWrite, Blocks: 64, Delay: time.Millisecond})
	_, acked := readUntil(t, console, func(l guest.Line) bool { return l.Kind == guest.LineAck && l.Seq >= 20 })
	stop()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := vm.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("stop: %v; want to have waited for the storage", err)
	}
	if err := vm.Kill(); err != nil {
		t.Fatal(err)
	}
	if exit, err := vm.Wait(deadline(t)); err != nil || exit.Signal != syscall.SIGKILL {
		t.Errorf("exit %v, %v", exit, err)
	}
	if rep := verifyFile(t, h.disk, acked); !rep.OK() || rep.Last < acked {
		t.Errorf("acked %d, report %+v", acked, rep)
	}
}
