//go:build e2e

// Package e2e_test drives the real program: bin/basalt on LUNs that are files,
// with the peers that its users have (libnbd, QEMU's tools, fio, real guests),
// real signals and real kernels. Nothing here looks into the program; what it
// claims is what its exit codes, its output and the bytes on the LUN say.
//
// Every process that a test starts dies with the test.
package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"basalt/internal/clock"
)

// commandTimeout bounds a command that is not expected to wait for anything.
const commandTimeout = 90 * time.Second

// builtProgram is the program under test.
func builtProgram(t *testing.T) string {
	t.Helper()
	path, err := filepath.Abs("../bin/basalt")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("no program to test: %v; run make build first", err)
	}
	return path
}

// site is a LUN and the machine around it, as one host sees it.
type site struct {
	t    *testing.T
	bin  string
	dir  string // short, for a socket's address holds 107 bytes
	lun  string
	host string // --host-name
}

// newSite makes a folder and a volume in it; create are arguments of fs create.
func newSite(t *testing.T, create ...string) *site {
	t.Helper()
	s := emptySite(t)
	s.ok(append([]string{"fs", "create", s.lun}, create...)...)
	return s
}

// emptySite has a folder and no LUN in it yet.
func emptySite(t *testing.T) *site {
	t.Helper()
	dir, err := os.MkdirTemp("", "e2e")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return &site{t: t, bin: builtProgram(t), dir: dir, lun: filepath.Join(dir, "lun"), host: "a"}
}

// as is the same site, seen by another host.
func (s *site) as(host string) *site {
	other := *s
	other.host = host
	return &other
}

// path is a file in the site's folder.
func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

// at is the address of an object on the LUN.
func (s *site) at(path string) string { return s.lun + ":" + path }

// result is how a command ended.
type result struct {
	code     int // -1: by a signal
	out, err string
}

func (s *site) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, s.bin, append([]string{"--host-name", s.host, "--run-dir", s.path("run")}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// runToItsEnd runs a command that dies with the test. The kernel means the thread
// that started it, so that is kept until the command has ended.
func runToItsEnd(cmd *exec.Cmd) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return cmd.Run()
}

// run runs the program with nothing on its standard input.
func (s *site) run(args ...string) result { return s.runWith(nil, args...) }

func (s *site) runWith(stdin []byte, args ...string) result {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	r, err := s.attempt(s.command(ctx, args...), stdin)
	if err = errors.Join(ctx.Err(), err); err != nil {
		s.t.Fatalf("basalt %q: %v: %s", args, err, r.err)
	}
	return r
}

// attempt runs a command of the program. The error is of running it at all.
func (s *site) attempt(cmd *exec.Cmd, stdin []byte) (result, error) {
	cmd.Stdin = bytes.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := runToItsEnd(cmd)
	if _, exited := errors.AsType[*exec.ExitError](err); exited {
		err = nil
	}
	return result{code: cmd.ProcessState.ExitCode(), out: out.String(), err: errs.String()}, err
}

// ok demands success and returns the standard output.
func (s *site) ok(args ...string) string {
	s.t.Helper()
	return s.okWith(nil, args...)
}

func (s *site) okWith(stdin []byte, args ...string) string {
	s.t.Helper()
	r := s.runWith(stdin, args...)
	if r.code != 0 {
		s.t.Fatalf("basalt %q: exit code %d, want 0: %s", args, r.code, r.err)
	}
	return r.out
}

// fails demands an exit code and one line on standard error that says so in the
// given words.
func (s *site) fails(code int, says string, args ...string) {
	s.t.Helper()
	r := s.run(args...)
	line, complete := strings.CutSuffix(r.err, "\n")
	switch {
	case r.code != code:
		s.t.Errorf("basalt %q: exit code %d, want %d: %s%s", args, r.code, code, r.out, r.err)
	case !complete || strings.ContainsAny(line, "\n\r") || !strings.HasPrefix(line, "basalt: "):
		s.t.Errorf("basalt %q: the error is not one line: %q", args, r.err)
	case !strings.Contains(line, says):
		s.t.Errorf("basalt %q: %q does not say %q", args, line, says)
	default:
		s.t.Logf("exit %d: %s", code, line)
	}
}

// decode runs a command with --json and decodes what it prints.
func decode[T any](s *site, args ...string) T {
	s.t.Helper()
	var v T
	out := s.ok(append(args, "--json")...)
	dec := json.NewDecoder(strings.NewReader(out))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&v); err != nil {
		s.t.Fatalf("basalt %q: %v in %s", args, err, out)
	}
	return v
}

// checkClean demands that the volume is sound.
func (s *site) checkClean() {
	s.t.Helper()
	if r := s.run("fs", "check", s.lun); r.code != 0 {
		s.t.Errorf("fs check: exit code %d: %s%s", r.code, r.out, r.err)
	}
}

// tool runs another program and returns its standard output.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := tryTool(t, name, args...)
	if err != nil {
		t.Fatalf("%s %q: %v", name, args, err)
	}
	return out
}

// tryTool is tool for one that may fail; the error holds what it said.
func tryTool(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, needTool(t, name), args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Dir = t.TempDir() // fio leaves files behind
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := runToItsEnd(cmd)
	if err != nil {
		said := strings.TrimSpace(errs.String() + out.String())
		err = errors.Join(ctx.Err(), err, errors.New(said[:min(len(said), maxSaid)]))
	}
	return out.String(), err
}

// maxSaid bounds what is shown of a failed tool's output, in bytes.
const maxSaid = 2000

func needTool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("no %s on this machine: %v", name, err)
	}
	return path
}

// pause is how long to wait between two looks at something.
const pause = 10 * time.Millisecond

// eventually waits until cond holds.
func eventually(t *testing.T, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	clk := clock.System{}
	for end := clk.Now().Add(limit); !cond(); {
		if clk.Now() > end {
			t.Fatalf("not within %v: %s", limit, what)
		}
		wait(pause)
	}
}

// wait lets real time pass where passing time is what a test is about.
func wait(d time.Duration) { <-clock.System{}.NewTimer(d).C }

// took measures f.
func took(f func()) time.Duration {
	start := clock.System{}.Now()
	f()
	return clock.System{}.Now().Sub(start)
}
