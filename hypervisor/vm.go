package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"basalt/hypervisor/qmp"
	"basalt/internal/clock"
)

// Errors of a running VM.
var (
	// ErrNotRunning: no QEMU of this run folder lives.
	ErrNotRunning = errors.New("hypervisor: the VM is not running")
	// ErrForced: the guest did not power off in time and was cut off.
	ErrForced = errors.New("hypervisor: the guest did not power off in time")
)

// VM is a QEMU process and its monitor. Its methods may be called at the same
// time. Whoever got it calls Close, which leaves the QEMU running.
type VM struct {
	clk  clock.Clock
	log  *slog.Logger
	proc *process
	mon  *qmp.Client
	rec  record
}

// Attach finds the running VM of a run folder again, after its starter's
// restart. ErrNotRunning: there is none; a QEMU that its starter left before the
// guest's first instruction is ended, and counts as none. While another process
// holds the monitor, Attach waits for ctx.
func Attach(ctx context.Context, clk clock.Clock, log *slog.Logger, runDir string) (*VM, error) {
	lock, err := lockRunDir(runDir)
	if err == nil {
		return nil, errors.Join(ErrNotRunning, lock.Close())
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNotRunning
	}
	if !errors.Is(err, ErrRunning) {
		return nil, err
	}
	proc, rec, err := findProcess(runDir)
	if errors.Is(err, os.ErrProcessDone) {
		return nil, errors.Join(ErrNotRunning, quitUnrecorded(ctx, clk, runDir))
	}
	if err != nil {
		return nil, err
	}
	mon, err := qmp.Dial(ctx, filepath.Join(runDir, qmpName))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("hypervisor: attach to VM %q: %w", rec.Name, err), proc.release())
	}
	return &VM{clk: clk, log: log.With("vm", rec.Name, "pid", rec.PID), proc: proc, mon: mon, rec: rec}, nil
}

// KillRunDir ends the VM of a run folder without its monitor, for one whose
// starter is stuck, and returns once its QEMU is gone. Writes that QEMU sent
// before may still be on their way in the storage.
func KillRunDir(ctx context.Context, runDir string) error {
	proc, _, err := findProcess(runDir)
	if errors.Is(err, os.ErrProcessDone) {
		return ErrNotRunning
	}
	if err != nil {
		return err
	}
	err = proc.signal(unix.SIGKILL)
	if err == nil {
		_, err = proc.wait(ctx)
	}
	return errors.Join(err, proc.release())
}

// findProcess returns the recorded process, or os.ErrProcessDone.
func findProcess(runDir string) (*process, record, error) {
	rec, err := readRecord(runDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, rec, os.ErrProcessDone
	}
	if err != nil {
		return nil, rec, err
	}
	boot, err := bootID()
	if err != nil {
		return nil, rec, err
	}
	if boot != rec.BootID {
		return nil, rec, os.ErrProcessDone
	}
	proc, err := openProcess(rec.PID, rec.StartTicks)
	return proc, rec, err
}

// quitUnrecorded ends a QEMU that holds the lock but has no record, and waits for
// the lock: its starter died in Start, and its guest never ran.
func quitUnrecorded(ctx context.Context, clk clock.Clock, runDir string) error {
	mon, err := qmp.Dial(ctx, filepath.Join(runDir, qmpName))
	if err != nil {
		return err
	}
	err = mon.Quit(ctx)
	if errors.Is(err, qmp.ErrClosed) { // it may end before it answers
		err = nil
	}
	if err := errors.Join(err, mon.Close()); err != nil {
		return err
	}
	const pollEvery = 10 * time.Millisecond
	for {
		lock, err := lockRunDir(runDir)
		if err == nil {
			return lock.Close()
		}
		if !errors.Is(err, ErrRunning) {
			return err
		}
		t := clk.NewTimer(pollEvery)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return errors.Join(err, ctx.Err())
		}
	}
}

// Name is the Spec's.
func (vm *VM) Name() string { return vm.rec.Name }

// PID is QEMU's process id.
func (vm *VM) PID() int { return vm.rec.PID }

// Accel is the accelerator and why it was chosen.
func (vm *VM) Accel() Accel { return vm.rec.Accel }

// Confined says whether QEMU has its own user, namespaces and root folder.
func (vm *VM) Confined() bool { return vm.rec.Confined }

// ConsolePath is the console's unix socket or file.
func (vm *VM) ConsolePath() string { return vm.rec.Console }

// QMP is the monitor, for commands that VM does not wrap.
func (vm *VM) QMP() *qmp.Client { return vm.mon }

// Events are the monitor's events, for one reader. The channel is closed when
// the monitor is gone; Wait tells whether QEMU is.
func (vm *VM) Events() <-chan qmp.Event { return vm.mon.Events() }

// Pause stops the guest after its running I/O has ended, so it waits while the
// storage does not answer.
func (vm *VM) Pause(ctx context.Context) error { return vm.mon.Stop(ctx) }

// Resume runs the guest. After an I/O error the guest may stop again at once, so
// the caller looks at the status and repeats with a growing pause.
func (vm *VM) Resume(ctx context.Context) error { return vm.mon.Cont(ctx) }

// Shutdown presses the guest's power button and waits for grace; a guest that is
// still there then, or cannot be asked, is cut off as by Stop, and the error
// wraps ErrForced. When ctx ends first Shutdown returns its error, and the guest
// may still power off.
func (vm *VM) Shutdown(ctx context.Context, grace time.Duration) error {
	deadline := vm.clk.NewTimer(grace)
	defer deadline.Stop()
	asked := vm.mon.Powerdown(ctx)
	if asked == nil {
		select {
		case <-vm.proc.done:
			return vm.proc.err
		case <-ctx.Done():
			return fmt.Errorf("hypervisor: shut down VM %q: %w", vm.rec.Name, ctx.Err())
		case <-deadline.C:
		}
	}
	vm.log.Warn("guest did not power off, quitting qemu", "grace", grace, "asked", asked == nil)
	return errors.Join(fmt.Errorf("%w: VM %q", ErrForced, vm.rec.Name), asked, vm.Stop(ctx))
}

// Stop ends QEMU at once and waits for it; the guest sees a power cut. It can
// take until ctx ends when the storage does not answer: QEMU first waits for
// running I/O, and answers no further command. Kill does not wait.
func (vm *VM) Stop(ctx context.Context) error {
	// The connection may end before the reply arrives; the process tells the truth.
	quitErr := vm.mon.Quit(ctx)
	if errors.Is(quitErr, qmp.ErrClosed) {
		quitErr = nil
	}
	if quitErr != nil {
		return quitErr
	}
	_, err := vm.Wait(ctx)
	return err
}

// Kill ends QEMU by SIGKILL and does not wait. Writes that QEMU sent before may
// still be on their way in the storage.
func (vm *VM) Kill() error { return vm.proc.signal(unix.SIGKILL) }

// Wait waits for QEMU's end.
func (vm *VM) Wait(ctx context.Context) (Exit, error) { return vm.proc.wait(ctx) }

// Close lets go of the VM and leaves it running.
func (vm *VM) Close() error {
	var err error
	if vm.mon != nil { // a failed start may have none
		err = vm.mon.Close()
	}
	return errors.Join(err, vm.proc.release())
}
