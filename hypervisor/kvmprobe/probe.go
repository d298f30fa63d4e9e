// Package kvmprobe tells whether KVM on this host can run a real operating
// system. Opening /dev/kvm proves nothing: there are hosts (nested
// para-virtualization) where it opens, creates VMs, runs the first thousand
// instructions and then hangs a stock kernel or returns from SYSCALL in the wrong
// ring.
//
// Two stages run the same small guest (payload/probe.S), which enters long mode,
// takes a page fault, goes to ring 3 and back by SYSCALL and remaps pages: first
// on a bare vCPU by ioctl, in a forked child that is killed after a second; then
// in the very QEMU and CPU model the VMs will have. KVM is accepted only if both
// succeed. A verdict takes under 50 ms when the first stage fails and about a
// second when all is well.
//
// The package keeps nothing: a caller may keep a Verdict for as long as boot,
// QEMU and CPU model stay the same. A positive verdict was so far seen only with
// the QEMU stage under TCG: there was no host with working KVM to test on.
package kvmprobe

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

//go:embed payload/probe.bin
var payload []byte

// What the guest says when every step succeeded.
const (
	allSteps    = "12345678"
	verdictGood = 0x42
	// isa-debug-exit ends QEMU with twice the verdict plus one.
	exitGood = verdictGood<<1 | 1
)

// Limits of the stages. QEMU's is many times what it needs, for a busy host must
// not look like a broken one.
const (
	rawLimit  = time.Second
	qemuLimit = 5 * time.Second
)

// Verdict is what was found.
type Verdict struct {
	OK     bool
	Reason string // one line for people, also when OK
	QEMU   string // absolute path of the program it was found with
	CPU    string // the CPU model it was found with
}

// Probe runs both stages with the given QEMU program and CPU model (QEMU's -cpu).
// It takes at most eight seconds, a hung child's removal included. What goes wrong is a reason against KVM, never
// an error; so is the end of ctx.
func Probe(ctx context.Context, qemu, cpu string) Verdict {
	v := Verdict{QEMU: qemu, CPU: cpu}
	path, err := exec.LookPath(qemu)
	if err == nil {
		v.QEMU, err = filepath.Abs(path)
	}
	if err != nil {
		v.Reason = err.Error()
		return v
	}
	if err := probe(ctx, v.QEMU, cpu); err != nil {
		v.Reason = err.Error()
		return v
	}
	v.OK, v.Reason = true, "a guest passed long mode, faults, SYSCALL and paging on a bare vCPU and in QEMU with -cpu "+cpu
	return v
}

func probe(ctx context.Context, qemu, cpu string) error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	err = errors.Join(ctx.Err(), rawStage(f), f.Close())
	if err != nil {
		return fmt.Errorf("bare vCPU%s: %w", hint(), err)
	}
	ctx, cancel := context.WithTimeout(ctx, qemuLimit)
	defer cancel()
	if err := qemuStage(ctx, qemu, "kvm", cpu); err != nil {
		return fmt.Errorf("QEMU -cpu %s%s: %w", cpu, hint(), err)
	}
	return nil
}

// hint names what is known to break KVM, for the person who reads the reason.
func hint() string {
	if unix.Access("/sys/module/kvm_pvm", unix.F_OK) == nil {
		return " (kvm_pvm is loaded)"
	}
	return ""
}

// guestSteps names what the payload's digits stand for.
var guestSteps = [len(allSteps)]string{
	"long mode", "model-specific registers", "control registers", "page fault", "ring 3 and SYSCALL", "SYSCALL",
	"SYSRET", "remapped pages",
}

// judge compares what the guest said with what it should have.
func judge(said string, verdict int) error {
	if said == allSteps && verdict == verdictGood {
		return nil
	}
	passed := len(strings.TrimRight(said, "!w"))
	if passed >= len(guestSteps) || !strings.HasPrefix(allSteps, said[:passed]) {
		return fmt.Errorf("the guest said %q", said)
	}
	at := fmt.Sprintf("at step %d of %d (%s)", passed+1, len(guestSteps), guestSteps[passed])
	switch {
	case strings.HasSuffix(said, "!"):
		return fmt.Errorf("the guest took an unexpected exception %s", at)
	case strings.HasSuffix(said, "w"):
		return fmt.Errorf("the guest found a wrong result %s", at)
	default:
		return fmt.Errorf("the guest stopped %s", at)
	}
}

// qemuStage runs the guest in QEMU until ctx ends.
func qemuStage(ctx context.Context, qemu, accel, cpu string) error {
	image, err := os.CreateTemp("", "basalt-kvmprobe-")
	if err != nil {
		return err
	}
	defer os.Remove(image.Name())
	_, err = image.Write(payload)
	if err := errors.Join(err, image.Close()); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, qemu, "-accel", accel, "-M", "q35", "-cpu", cpu, "-m", "16",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-net", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-kernel", image.Name(),
		"-chardev", "stdio,id=c,signal=off", "-device", "isa-debugcon,iobase=0xe9,chardev=c",
		"-device", "isa-debug-exit,iobase=0xf4,iosize=4")
	var said, complaint limited
	cmd.Stdout, cmd.Stderr = &said, &complaint
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	if ctx.Err() != nil {
		return fmt.Errorf("no verdict in time (%w); the guest said %q", context.Cause(ctx), said.String())
	}
	exit, isExit := errors.AsType[*exec.ExitError](err)
	if !isExit {
		return errors.Join(errors.New("ended without a verdict"), err)
	}
	if exit.ExitCode() == exitGood {
		return judge(said.String(), verdictGood)
	}
	if words := strings.Join(strings.Fields(complaint.String()), " "); words != "" {
		return fmt.Errorf("%w: %s", err, words)
	}
	return errors.Join(judge(said.String(), 0), err)
}

// limited keeps the first bytes written to it.
type limited struct{ b []byte }

const keepBytes = 512

func (l *limited) Write(p []byte) (int, error) {
	l.b = append(l.b, p[:min(len(p), keepBytes-len(l.b))]...)
	return len(p), nil
}

func (l *limited) String() string { return strings.ToValidUTF8(string(l.b), "?") }
