//go:build e2e

package e2e_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// process is a program that a test runs beside itself.
type process struct {
	t    *testing.T
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended and all its output is read

	mu    sync.Mutex // guards lines
	lines []string   // of its standard output and error
}

// start starts cmd; the process is killed at the test's end if it still runs.
func start(t *testing.T, name string, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{t: t, name: name, cmd: cmd, done: make(chan struct{})}
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, w
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started := make(chan error)
	go func() {
		defer close(p.done)
		// The signal comes when the thread dies that started the process: it is kept.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		w.Close()
		started <- err
		p.read(out)
		if err == nil {
			_ = cmd.Wait() // ProcessState tells
		}
	}()
	if err := <-started; err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Process.Signal(syscall.SIGCONT)
		<-p.done
		if t.Failed() {
			t.Logf("%s said:\n%s", name, strings.Join(p.said(), "\n"))
		}
	})
	return p
}

func (p *process) read(r io.ReadCloser) {
	defer r.Close()
	for s := bufio.NewScanner(r); s.Scan(); {
		p.mu.Lock()
		p.lines = append(p.lines, s.Text())
		p.mu.Unlock()
	}
}

// said returns the lines so far.
func (p *process) said() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.lines...)
}

// says waits for a line that holds text and returns it.
func (p *process) says(limit time.Duration, text string) string {
	p.t.Helper()
	var found string
	eventually(p.t, limit, fmt.Sprintf("%s says %q", p.name, text), func() bool {
		for _, l := range p.said() {
			if strings.Contains(l, text) {
				found = l
				return true
			}
		}
		select {
		case <-p.done:
			p.t.Fatalf("%s ended (%v) without saying %q:\n%s", p.name, p.cmd.ProcessState, text, strings.Join(p.said(), "\n"))
		default:
		}
		return false
	})
	return found
}

func (p *process) signal(sig syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Fatalf("%s: %v: %v", p.name, sig, err)
	}
}

// freeze stops the process and waits until the kernel says that it stands.
func (p *process) freeze() {
	p.t.Helper()
	p.signal(syscall.SIGSTOP)
	eventually(p.t, 5*time.Second, p.name+" is stopped", func() bool { return stateOf(p.cmd.Process.Pid) == "T" })
}

// awaitZombie waits until the kernel has taken the process apart. Its output may
// stay open: children have it too.
func (p *process) awaitZombie() {
	p.t.Helper()
	eventually(p.t, 10*time.Second, p.name+" is dead", func() bool {
		s := stateOf(p.cmd.Process.Pid)
		return s == "Z" || s == ""
	})
}

// stateOf is the kernel's letter for a process; "" when it is gone.
func stateOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	return fields[0]
}

// kill ends the process at once and waits until it is gone.
func (p *process) kill() {
	p.t.Helper()
	p.signal(syscall.SIGKILL)
	p.ends(10 * time.Second)
}

// ends waits for the process's end and returns its exit code, -1 after a signal.
func (p *process) ends(limit time.Duration) int {
	p.t.Helper()
	select {
	case <-p.done:
	default:
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		select {
		case <-p.done:
		case <-ctx.Done():
			p.t.Fatalf("%s has not ended after %v:\n%s", p.name, limit, strings.Join(p.said(), "\n"))
		}
	}
	return p.cmd.ProcessState.ExitCode()
}

// killedBy is the signal that ended the process; 0 when none did.
func (p *process) killedBy() syscall.Signal {
	if ws, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return ws.Signal()
	}
	return 0
}

// server is a running "disk serve".
type server struct {
	*process
	socket string // of NBD
}

// serve starts "disk serve" on a unix socket named for the host and returns once
// it listens; more are further arguments.
func (s *site) serve(more ...string) *server {
	s.t.Helper()
	v := s.startServe(more...)
	v.says(30*time.Second, " serves on ")
	return v
}

// startServe is serve that does not wait.
func (s *site) startServe(more ...string) *server {
	s.t.Helper()
	socket := s.path(s.host + ".nbd")
	args := append([]string{"disk", "serve", s.lun, "--nbd", "unix:" + socket}, more...)
	return &server{start(s.t, "server "+s.host, s.command(context.Background(), args...)), socket}
}

// stop ends the server in order.
func (v *server) stop() {
	v.t.Helper()
	v.signal(syscall.SIGTERM)
	if code := v.ends(30 * time.Second); code != 0 {
		v.t.Errorf("%s: exit code %d after SIGTERM:\n%s", v.name, code, strings.Join(v.said(), "\n"))
	}
}

// uri names an export of the server.
func (v *server) uri(export string) string {
	return "nbd+unix:///" + export + "?socket=" + v.socket
}

// children lists the processes whose parent is pid.
func children(t *testing.T, pid int) []int {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	var found []int
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		var child, parent int
		var state string
		if _, err := fmt.Sscan(string(b), &child); err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Sscan(string(b[strings.LastIndexByte(string(b), ')')+1:]), &state, &parent); err != nil {
			t.Fatal(err)
		}
		if parent == pid {
			found = append(found, child)
		}
	}
	return found
}

func sysStat(t *testing.T, fi os.FileInfo) *syscall.Stat_t {
	t.Helper()
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		t.Fatalf("no stat of %s", fi.Name())
	}
	return st
}
