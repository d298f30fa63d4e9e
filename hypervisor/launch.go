package hypervisor

import (
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// launch is what becomes a QEMU.
type launch struct {
	program  string
	args     []string // without the program's name
	files    []*os.File
	uid, gid uint32
	root     *rootPlan // nil: stay in the starter's root and namespaces
}

// start runs the program and returns its pid and a pidfd.
//
// Namespaces, root folder, no_new_privs and the capability bounding set belong to
// a thread and pass to its children. So a thread of its own takes them on, forks,
// and is thrown away: its goroutine ends while locked to it, and the runtime then
// ends the thread. Until then the runtime starts no thread from a locked one.
//
// The thread may have served other goroutines before. A process that one of them
// started with Pdeathsig is killed when it ends; no starter may use Pdeathsig,
// other than on a thread it keeps locked.
func (l launch) start() (pid, pidfd int, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end, and /proc shows its root as the process's.
			// While this goroutine sits on it, another one gets another thread.
			defer runtime.UnlockOSThread()
			pid, pidfd, err = l.start()
			return
		}
		pid, pidfd, err = l.startHere()
	}()
	<-done
	return pid, pidfd, err
}

func (l launch) startHere() (pid, pidfd int, err error) {
	fds := make([]uintptr, len(l.files))
	for i, f := range l.files {
		fds[i] = f.Fd()
	}
	attr := &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd}
	if l.root != nil {
		if err := l.root.enter(); err != nil {
			return 0, 0, err
		}
		if err := dropBoundingSet(); err != nil {
			return 0, 0, err
		}
		// Groups is empty, so setgroups drops all. Leaving uid 0 empties the
		// permitted, effective and ambient sets.
		attr.Credential = &syscall.Credential{Uid: l.uid, Gid: l.gid}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return 0, 0, fmt.Errorf("hypervisor: no_new_privs: %w", err)
	}
	argv := append([]string{l.program}, l.args...)
	pid, err = syscall.ForkExec(l.program, argv, &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/bin:/bin", "LC_ALL=C.UTF-8"}, Files: fds, Sys: attr,
	})
	if err != nil {
		return 0, 0, fmt.Errorf("hypervisor: start %s: %w", l.program, err)
	}
	return pid, pidfd, nil
}

// dropBoundingSet makes every capability unreachable for this thread's children.
func dropBoundingSet() error {
	for cap := range uintptr(64) {
		have, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, cap, 0, 0, 0)
		if err != nil {
			return nil // beyond the kernel's last capability
		}
		if have == 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, cap, 0, 0, 0); err != nil {
			return fmt.Errorf("hypervisor: drop capability %d: %w", cap, err)
		}
	}
	return nil
}
