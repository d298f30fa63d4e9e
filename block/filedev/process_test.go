package filedev_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"basalt/block"
	"basalt/block/blocktest"
	"basalt/block/filedev"
)

// roleVariable makes the test binary play a host instead of running tests.
const roleVariable = "BASALT_FILEDEV_ROLE"

const (
	holderSlot       = 3
	holderGeneration = 7
	incrementsEach   = 150
)

func TestMain(m *testing.M) {
	role := os.Getenv(roleVariable)
	if role == "" {
		os.Exit(m.Run())
	}
	if err := play(role, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// play opens the file, does what the role says, prints "ready", and stays until
// its standard input ends.
func play(role, path string) error {
	ctx := context.Background()
	d, err := filedev.Open(path, filedev.Options{})
	if err != nil {
		return err
	}
	switch role {
	case "guard":
		err = d.Guard(ctx, holderSlot, holderGeneration)
	case "guard and leave a child":
		if err = d.Guard(ctx, holderSlot, holderGeneration); err == nil {
			// The child inherits only the standard input, through which it ends.
			child := exec.Command("cat")
			child.Stdin = os.Stdin
			err = child.Start()
		}
	case "count":
		return blocktest.Increment(ctx, d, 4096, incrementsEach)
	default:
		err = fmt.Errorf("no role %q", role)
	}
	if err != nil {
		return err
	}
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// host is a child process that has the file open.
type host struct {
	cmd   *exec.Cmd
	stdin io.Closer
	who   block.Process
}

func newHost(t *testing.T, role, path string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, os.Args[0], path)
	cmd.Env = append(os.Environ(), roleVariable+"="+role)
	cmd.Stderr = os.Stderr
	return cmd
}

// startHost returns when the host is ready.
func startHost(t *testing.T, role, path string) *host {
	t.Helper()
	cmd := newHost(t, role, path)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	h := &host{cmd: cmd, stdin: stdin}
	t.Cleanup(func() {
		stdin.Close()
		cmd.Process.Kill()
		cmd.Wait()
	})
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("host says %q, %v", line, err)
	}
	self, err := filedev.Self()
	if err != nil {
		t.Fatal(err)
	}
	h.who = self
	h.who.PID = uint32(cmd.Process.Pid)
	h.who.StartTicks = ticksOf(t, cmd.Process.Pid)
	return h
}

// ticksOf reads the start time of a process whose name has no spaces.
func ticksOf(t *testing.T, pid int) uint64 {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	var ticks uint64
	if _, err := fmt.Sscan(strings.Fields(string(stat))[21], &ticks); err != nil {
		t.Fatal(err)
	}
	return ticks
}

func (h *host) holder() block.Holder {
	return block.Holder{Slot: holderSlot, Generation: holderGeneration, Process: h.who, Fencers: block.FenceOFD}
}

func (h *host) signal(t *testing.T, sig unix.Signal) {
	t.Helper()
	if err := unix.Kill(h.cmd.Process.Pid, sig); err != nil {
		t.Fatal(err)
	}
}

// state is the process state letter of proc(5), such as T for stopped.
func (h *host) state(t *testing.T) string {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", h.cmd.Process.Pid))
	if err != nil {
		return "gone"
	}
	return strings.Fields(string(stat))[2]
}

// alive tells whether the process still runs or is stopped.
func (h *host) alive(t *testing.T) bool {
	t.Helper()
	s := h.state(t)
	return s != "Z" && s != "X" && s != "gone"
}

func gone(t *testing.T, d *filedev.Device, h block.Holder) bool {
	t.Helper()
	g, err := d.Gone(t.Context(), h)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// observer opens the file as a breaker does, with a short wait for locks.
func observer(t *testing.T, path string) *filedev.Device {
	t.Helper()
	d := open(t, path, filedev.Options{FenceWait: 5 * time.Second})
	if d.Kinds() != block.FenceOFD {
		t.Skip("the temporary filesystem is not a known local one")
	}
	return d
}

func TestKilledHolderIsGoneAtOnce(t *testing.T) {
	path := newFile(t, 1<<20)
	d := observer(t, path)
	h := startHost(t, "guard", path)
	if gone(t, d, h.holder()) {
		t.Fatal("a running holder is reported gone")
	}
	if err := d.Guard(t.Context(), holderSlot, holderGeneration+1); !errors.Is(err, block.ErrBusy) {
		t.Fatalf("guard of a held slot: %v, want %v", err, block.ErrBusy)
	}
	h.signal(t, unix.SIGKILL)
	h.cmd.Wait()
	if !gone(t, d, h.holder()) {
		t.Error("a killed holder is not reported gone")
	}
	if err := d.Fence(t.Context(), h.holder()); err != nil {
		t.Errorf("fence of a killed holder: %v", err)
	}
	if err := d.Guard(t.Context(), holderSlot, holderGeneration+1); err != nil {
		t.Errorf("guard after the holder's death: %v", err)
	}
}

func TestFrozenHolderIsKilledByFence(t *testing.T) {
	path := newFile(t, 1<<20)
	d := observer(t, path)
	h := startHost(t, "guard", path)
	h.signal(t, unix.SIGSTOP)
	if gone(t, d, h.holder()) {
		t.Fatal("a frozen holder is reported gone")
	}
	if err := d.Fence(t.Context(), h.holder()); err != nil {
		t.Fatalf("fence of a frozen holder: %v", err)
	}
	h.cmd.Wait() // the lock goes a moment before the process does
	if status := h.cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signal() != unix.SIGKILL {
		t.Errorf("the holder ended with %v, want SIGKILL", status)
	}
	if !gone(t, d, h.holder()) {
		t.Error("a fenced holder is not reported gone")
	}
}

func TestChildOfTheHolderDoesNotKeepTheLock(t *testing.T) {
	path := newFile(t, 1<<20)
	d := observer(t, path)
	h := startHost(t, "guard and leave a child", path)
	h.signal(t, unix.SIGKILL)
	h.cmd.Process.Wait() // not cmd.Wait, which closes the child's standard input
	if !gone(t, d, h.holder()) {
		t.Error("the lock outlives its holder in a child process")
	}
}

func TestFenceNeverKillsAnyoneElse(t *testing.T) {
	path := newFile(t, 1<<20)
	d := observer(t, path)
	h := startHost(t, "guard", path)
	for name, change := range map[string]func(*block.Process){
		"other start time":    func(p *block.Process) { p.StartTicks++ },
		"other pid namespace": func(p *block.Process) { p.PIDNS++ },
		"other boot":          func(p *block.Process) { p.BootID[0] ^= 1 },
		"no such process":     func(p *block.Process) { p.PID = 1 << 30 },
		"pid 0":               func(p *block.Process) { p.PID = 0 },
	} {
		holder := h.holder()
		change(&holder.Process)
		if err := d.Fence(t.Context(), holder); !errors.Is(err, block.ErrBusy) {
			t.Errorf("%s: %v, want %v", name, err, block.ErrBusy)
		}
		if !h.alive(t) {
			t.Fatalf("%s: the process was killed", name)
		}
	}
	self, err := filedev.Self()
	if err != nil {
		t.Fatal(err)
	}
	holder := h.holder()
	holder.Process = self
	if err := d.Fence(t.Context(), holder); !errors.Is(err, block.ErrBusy) {
		t.Errorf("fence of this very process: %v, want %v", err, block.ErrBusy)
	}
}

func TestFenceNeedsTheMethodToBeAdvertised(t *testing.T) {
	path := newFile(t, 1<<20)
	d := observer(t, path)
	h := startHost(t, "guard", path)
	holder := h.holder()
	holder.Fencers = block.FencePR | block.FencePerson
	if err := d.Fence(t.Context(), holder); !errors.Is(err, block.ErrNotSupported) {
		t.Errorf("fence: %v, want %v", err, block.ErrNotSupported)
	}
	if !h.alive(t) {
		t.Error("the holder was killed")
	}
	if gone(t, d, holder) {
		t.Error("a holder that advertises no lock is reported gone")
	}
}

func TestHolderOfAnotherBoot(t *testing.T) {
	path := newFile(t, 1<<20)
	d := observer(t, path)
	self, err := filedev.Self()
	if err != nil {
		t.Fatal(err)
	}
	h := block.Holder{Slot: holderSlot, Generation: 1, Process: self, Fencers: block.FenceOFD}
	h.Process.BootID[5] ^= 0xff
	if gone(t, d, h) {
		t.Error("a holder of another boot is reported gone before its window")
	}
	if err := d.Fence(t.Context(), h); err != nil {
		t.Errorf("fence with its lock free: %v", err)
	}
}

func TestGuardIsOneHolderWithinAProcessToo(t *testing.T) {
	path := newFile(t, 1<<20)
	a, b := observer(t, path), observer(t, path)
	self, err := filedev.Self()
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Guard(t.Context(), 0, 1); err != nil {
		t.Fatal(err)
	}
	h := block.Holder{Slot: 0, Generation: 1, Process: self, Fencers: block.FenceOFD}
	for name, d := range map[string]*filedev.Device{"guarding": a, "other": b} {
		if err := d.Guard(t.Context(), 0, 2); !errors.Is(err, block.ErrBusy) {
			t.Errorf("second guard by the %s device: %v, want %v", name, err, block.ErrBusy)
		}
		if gone(t, d, h) {
			t.Errorf("the %s device reports a live holder gone", name)
		}
		if err := d.Fence(t.Context(), h); !errors.Is(err, block.ErrBusy) {
			t.Errorf("fence by the %s device: %v, want %v", name, err, block.ErrBusy)
		}
	}
	if err := a.Unguard(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if !gone(t, b, h) {
		t.Error("an unguarded slot is not reported gone")
	}
	if err := b.Guard(t.Context(), 0, 2); err != nil {
		t.Errorf("guard after unguard: %v", err)
	}
	if err := b.Fence(t.Context(), h); err != nil {
		t.Errorf("the holder of generation 2 fences generation 1: %v", err)
	}
	if err := a.Unguard(t.Context(), 0); err == nil {
		t.Error("unguard of a slot that this device does not guard succeeded")
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if err := a.Guard(t.Context(), 0, 3); err != nil {
		t.Errorf("guard after the holder closed: %v", err)
	}
}

func TestCompareAndWriteIsAtomicAcrossProcesses(t *testing.T) {
	path := newFile(t, 1<<20)
	d := observer(t, path)
	const processes = 3
	var cmds []*exec.Cmd
	for range processes {
		cmd := newHost(t, "count", path)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		cmds = append(cmds, cmd)
	}
	for _, cmd := range cmds {
		if err := cmd.Wait(); err != nil {
			t.Errorf("counting process: %v", err)
		}
	}
	got := make([]byte, d.Geometry().UnitBytes)
	if err := d.ReadAt(t.Context(), got, 4096); err != nil {
		t.Fatal(err)
	}
	if n := binary.LittleEndian.Uint64(got); n != processes*incrementsEach {
		t.Errorf("counter is %d after %d increments", n, processes*incrementsEach)
	}
}

// lockUnit holds the unit at offset 0 as a process frozen in its CompareAndWrite
// would, until release.
func lockUnit(t *testing.T, path string, lenBytes int) (release func()) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	lock := unix.Flock_t{Type: unix.F_WRLCK, Len: int64(lenBytes)}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
		t.Fatal(err)
	}
	return func() { f.Close() }
}

func TestCompareAndWriteOfAHeldUnitIsBusyAndChangesNothing(t *testing.T) {
	path := newFile(t, 1<<20)
	d := open(t, path, filedev.Options{CAWWait: 30 * time.Millisecond})
	if !d.Geometry().SharedCAW {
		t.Skip("the temporary filesystem is not a known local one")
	}
	u := d.Geometry().UnitBytes
	zero, one := make([]byte, u), bytes.Repeat([]byte{1}, u)
	release := lockUnit(t, path, u)

	if err := d.CompareAndWrite(t.Context(), 0, zero, one); !errors.Is(err, block.ErrBusy) {
		t.Errorf("%v, want %v", err, block.ErrBusy)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	if err := d.CompareAndWrite(ctx, 0, zero, one); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, block.ErrBusy) {
		t.Errorf("under a shorter context: %v, want only %v", err, context.DeadlineExceeded)
	}
	if err := d.CompareAndWrite(t.Context(), int64(u), zero, one); err != nil {
		t.Errorf("the neighbouring unit: %v", err)
	}
	got := make([]byte, u)
	if err := d.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, zero) {
		t.Errorf("the held unit changed to %d, %v", got[0], err)
	}
	release()
	if err := d.CompareAndWrite(t.Context(), 0, zero, one); err != nil {
		t.Errorf("after its release: %v", err)
	}
}

func TestOpenLeavesNoDescriptorToChildren(t *testing.T) {
	path := newFile(t, 1<<20)
	open(t, path, filedev.Options{})
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name()))
		if err != nil || target != path {
			continue
		}
		found = true
		info, err := os.ReadFile(filepath.Join("/proc/self/fdinfo", e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		var flags uint64
		for line := range strings.Lines(string(info)) {
			if v, ok := strings.CutPrefix(line, "flags:"); ok {
				fmt.Sscanf(strings.TrimSpace(v), "%o", &flags)
			}
		}
		if flags&unix.O_CLOEXEC == 0 {
			t.Errorf("descriptor %s is not close-on-exec: flags %#o", e.Name(), flags)
		}
	}
	if !found {
		t.Error("no descriptor of the device is listed")
	}
}
