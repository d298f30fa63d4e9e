package hypervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Exit is how a QEMU ended.
type Exit struct {
	// Known is false when another process was its parent, or its status could not
	// be had; Code and Signal then say nothing.
	Known  bool
	Code   int            // exit code, when Signal is 0
	Signal syscall.Signal // that killed it, or 0
}

func (e Exit) String() string {
	switch {
	case !e.Known:
		return "ended, status unknown"
	case e.Signal != 0:
		return "killed by " + e.Signal.String()
	default:
		return "exit code " + strconv.Itoa(e.Code)
	}
}

// process is a QEMU by pid and pidfd, so that a signal never hits a process that
// inherited the number.
type process struct {
	pid   int
	pidfd *os.File
	child bool          // ours to reap
	done  chan struct{} // closed after the process ended or the watch did; publishes exit, err
	exit  Exit
	err   error // the watch ended before the process
}

// watch owns pidfd and follows the process to its end, in a goroutine that
// release ends.
func watch(pid, pidfd int, child bool) (*process, error) {
	// Only a non-blocking descriptor joins the runtime's poller.
	if err := unix.SetNonblock(pidfd, true); err != nil {
		return nil, errors.Join(err, unix.Close(pidfd))
	}
	p := &process{pid: pid, pidfd: os.NewFile(uintptr(pidfd), "pidfd:"+strconv.Itoa(pid)), child: child, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.exit, p.err = p.await()
	}()
	return p, nil
}

func (p *process) await() (Exit, error) {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return Exit{}, err
	}
	var exit Exit
	var waitErr error
	err = conn.Read(func(fd uintptr) bool {
		var ended bool
		exit, ended, waitErr = pollExit(p.pid, int(fd), p.child)
		return ended || waitErr != nil
	})
	return exit, errors.Join(err, waitErr)
}

// pollExit says without waiting whether the process ended, and reaps a child.
func pollExit(pid, pidfd int, child bool) (exit Exit, ended bool, err error) {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, 0); err != nil && !errors.Is(err, unix.EINTR) {
		return Exit{}, false, err
	} else if n < 1 {
		return Exit{}, false, nil
	}
	if !child {
		return Exit{}, true, nil
	}
	// The number stays this child's until it is reaped here.
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &ws, syscall.WNOHANG, nil); err != nil {
		return Exit{}, false, err
	}
	if ws.Signaled() {
		return Exit{Known: true, Signal: ws.Signal()}, true, nil
	}
	return Exit{Known: true, Code: ws.ExitStatus()}, true, nil
}

// wait returns how the process ended. ctx ends only the wait.
func (p *process) wait(ctx context.Context) (Exit, error) {
	select {
	case <-p.done:
		return p.exit, p.err
	case <-ctx.Done():
		return Exit{}, fmt.Errorf("hypervisor: wait for process %d: %w", p.pid, ctx.Err())
	}
}

// signal does nothing once the process ended.
func (p *process) signal(sig syscall.Signal) error {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	if err := conn.Control(func(fd uintptr) { sendErr = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return err
	}
	if errors.Is(sendErr, unix.ESRCH) {
		return nil
	}
	return sendErr
}

// release ends the watch without touching the process.
func (p *process) release() error {
	err := p.pidfd.Close()
	<-p.done
	return err
}

// startTicks returns when a process began, in clock ticks since boot: with the
// pid it names a process of this boot for good.
func startTicks(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	// The second field is the program's name in parentheses and may hold anything.
	end := bytes.LastIndexByte(b, ')')
	if end < 0 {
		return 0, fmt.Errorf("hypervisor: /proc/%d/stat: %q", pid, b)
	}
	fields := strings.Fields(string(b[end+1:]))
	const startTimeField = 22 - 3 // counted from the third, proc(5)
	if len(fields) <= startTimeField {
		return 0, fmt.Errorf("hypervisor: /proc/%d/stat: %d fields", pid, len(fields))
	}
	return strconv.ParseUint(fields[startTimeField], 10, 64)
}

// openProcess finds a running process by pid and start time; os.ErrProcessDone
// when it is gone.
func openProcess(pid int, ticks uint64) (*process, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil, os.ErrProcessDone
	}
	if err != nil {
		return nil, err
	}
	// The number can be taken by another only once this descriptor's process is
	// gone, so a start time that matches now belongs to it.
	if have, err := startTicks(pid); err != nil || have != ticks {
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
			return nil, errors.Join(err, unix.Close(pidfd))
		}
		return nil, errors.Join(os.ErrProcessDone, unix.Close(pidfd))
	}
	return watch(pid, pidfd, false)
}

// bootID names this boot of the machine: pids and start times of another boot
// mean nothing.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}
