package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"basalt/hypervisor/kvmprobe"
	"basalt/hypervisor/qmp"
	"basalt/internal/clock"
)

// ErrRunning: a QEMU of this run folder lives already.
var ErrRunning = errors.New("hypervisor: the VM is running already")

// Options are a starter's choices, not the VM's.
type Options struct {
	QEMU string // program name or path; default qemu-system-x86_64
	// KVM is the last verdict of kvmprobe.Probe for this QEMU and the spec's CPU
	// model ("host" when it names none). Callers keep it per boot and QEMU version,
	// so that a VM does not change its processor from start to start. Start probes
	// anew when it is nil or of another program or model.
	KVM      *kvmprobe.Verdict
	ForceTCG bool
	// Paused leaves the guest before its first instruction; VM.Resume starts it.
	Paused bool
	// StartTimeout bounds the wait for QEMU's first word; default 30s.
	StartTimeout time.Duration
	// ReadOnlyPaths are further files and folders that this QEMU needs, for one
	// that is not installed under /usr.
	ReadOnlyPaths []string
}

// killWait bounds the wait for a killed QEMU. One that outlasts it is stuck in
// the kernel and still holds the run folder's lock.
const killWait = 10 * time.Second

// Start starts the VM. The guest runs when Start returns, unless opts.Paused.
// When it fails, or ctx ends first, no QEMU is left. Errors: ErrSpec, ErrRunning.
// Processes must not call Start and Attach on one run folder at the same time.
func Start(ctx context.Context, clk clock.Clock, log *slog.Logger, spec Spec, opts Options) (*VM, error) {
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	if err := spec.checkRights(); err != nil {
		return nil, err
	}
	if opts.QEMU == "" {
		opts.QEMU = "qemu-system-x86_64"
	}
	if opts.StartTimeout == 0 {
		opts.StartTimeout = 30 * time.Second
	}
	program, err := findProgram(opts.QEMU)
	if err != nil {
		return nil, err
	}
	opts.QEMU = program
	if err := prepareRunDir(spec.RunDir); err != nil {
		return nil, err
	}
	lock, err := lockRunDir(spec.RunDir)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	// From here on a record of an earlier QEMU would mislead Attach.
	if err := os.Remove(filepath.Join(spec.RunDir, recordName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	accel := chooseAccel(ctx, spec, opts)
	proc, confined, err := spawn(spec, accel, opts, lock)
	if err != nil {
		return nil, err
	}
	log = log.With("vm", spec.Name, "pid", proc.pid)
	log.Info("qemu started", "accel", accel.Kind, "reason", accel.Reason, "confined", confined)
	vm := &VM{clk: clk, log: log, proc: proc, rec: record{
		Name: spec.Name, PID: proc.pid, Accel: accel, Confined: confined, Console: consolePath(spec),
	}}
	if err := vm.bringUp(ctx, spec, opts); err != nil {
		return nil, fmt.Errorf("hypervisor: start VM %q: %w", spec.Name, vm.abandon(ctx, spec, err))
	}
	return vm, nil
}

func findProgram(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("hypervisor: %w", err)
	}
	return filepath.Abs(path)
}

// spawn forks the QEMU, which hangs before its guest's first instruction (-S).
func spawn(s Spec, accel Accel, opts Options, lock *os.File) (*process, bool, error) {
	l := launch{program: opts.QEMU, args: arguments(s, accel), uid: s.UID, gid: s.GID}
	confined := os.Geteuid() == 0
	if confined {
		at := filepath.Join(s.RunDir, rootName)
		if err := os.Mkdir(at, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, false, err
		}
		opts.ReadOnlyPaths = append(opts.ReadOnlyPaths[:len(opts.ReadOnlyPaths):len(opts.ReadOnlyPaths)], opts.QEMU)
		l.root = planRoot(at, s, accel, opts)
	}
	files, err := inherited(s, lock)
	if err != nil {
		return nil, false, err
	}
	l.files = files
	pid, pidfd, err := l.start()
	// Our copies go: only then does the monitor's socket die with QEMU.
	closeAll(files, lock)
	if err != nil {
		return nil, false, err
	}
	p, err := watch(pid, pidfd, true)
	if err != nil {
		return nil, false, errors.Join(err, killChild(pid))
	}
	return p, confined, nil
}

// killChild ends a child that nothing watches.
func killChild(pid int) error {
	err := unix.Kill(pid, unix.SIGKILL)
	_, waitErr := unix.Wait4(pid, nil, 0, nil)
	return errors.Join(err, waitErr)
}

// bringUp takes a fresh QEMU to a recorded, running one.
func (vm *VM) bringUp(ctx context.Context, s Spec, opts Options) error {
	ctx, cancel := context.WithTimeout(ctx, opts.StartTimeout)
	defer cancel()
	var err error
	if vm.mon, err = qmp.Dial(ctx, filepath.Join(s.RunDir, qmpName)); err != nil {
		return err
	}
	if vm.rec.StartTicks, err = startTicks(vm.rec.PID); err != nil {
		return err
	}
	if vm.rec.BootID, err = bootID(); err != nil {
		return err
	}
	if err := vm.rec.write(s.RunDir); err != nil {
		return err
	}
	if opts.Paused {
		return nil
	}
	return vm.mon.Cont(ctx)
}

// abandon ends the QEMU of a failed start and returns cause with what QEMU said.
func (vm *VM) abandon(ctx context.Context, s Spec, cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killWait)
	defer cancel()
	killErr := vm.Kill()
	exit, waitErr := vm.proc.wait(ctx)
	err := errors.Join(cause, killErr, waitErr, vm.Close())
	if said := logTail(filepath.Join(s.RunDir, logName)); said != "" {
		return fmt.Errorf("%w: qemu: %s (%s)", err, said, exit)
	}
	return err
}

// logTail returns the last words of a QEMU's log as one line.
func logTail(path string) string {
	const tailBytes = 1024
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	b = b[max(0, len(b)-tailBytes):]
	return strings.Join(strings.FieldsFunc(strings.ToValidUTF8(string(b), "?"), func(r rune) bool { return r == '\n' }), "; ")
}
