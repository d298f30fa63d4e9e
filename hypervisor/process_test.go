package hypervisor

import (
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// child starts a program that ends when its stdin does.
func child(t *testing.T, script string) (pid int, end func()) {
	t.Helper()
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Skip("no sh")
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	pid, err = syscall.ForkExec(sh, []string{"sh", "-c", script}, &syscall.ProcAttr{Files: []uintptr{r.Fd(), null.Fd(), null.Fd()}})
	if err != nil {
		t.Fatal(err)
	}
	return pid, func() { w.Close() }
}

func TestProcessReportsHowItsChildEnded(t *testing.T) {
	for script, want := range map[string]Exit{
		"exit 3":                {Known: true, Code: 3},
		"read x; exit 0":        {Known: true},
		"kill -KILL $$; exit 1": {Known: true, Signal: syscall.SIGKILL},
	} {
		pid, end := child(t, script)
		pidfd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		p, err := watch(pid, pidfd, true)
		if err != nil {
			t.Fatal(err)
		}
		end()
		if got, err := p.wait(t.Context()); err != nil || got != want {
			t.Errorf("%q: %v, %v; want %v", script, got, err, want)
		}
		if err := p.signal(syscall.SIGKILL); err != nil {
			t.Errorf("signal to an ended process: %v", err)
		}
		if err := p.release(); err != nil {
			t.Error(err)
		}
	}
}

func TestReleaseEndsTheWatchAndNotTheProcess(t *testing.T) {
	pid, end := child(t, "read x")
	defer func() {
		end()
		unix.Wait4(pid, nil, 0, nil)
	}()
	ticks, err := startTicks(pid)
	if err != nil {
		t.Fatal(err)
	}
	p, err := openProcess(pid, ticks)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.release(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.wait(t.Context()); err == nil {
		t.Error("a released watch claims to know the end")
	}
	again, err := openProcess(pid, ticks)
	if err != nil {
		t.Fatalf("the process is gone: %v", err)
	}
	if err := again.release(); err != nil {
		t.Error(err)
	}
}

func TestReusedPidIsNotTheProcess(t *testing.T) {
	pid, end := child(t, "read x")
	defer func() {
		end()
		unix.Wait4(pid, nil, 0, nil)
	}()
	ticks, err := startTicks(pid)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openProcess(pid, ticks+1); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("another start time: %v; want ErrProcessDone", err)
	}
}

func TestRunDirLockLivesWithTheInheritingProcess(t *testing.T) {
	dir := t.TempDir()
	lock, err := lockRunDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockRunDir(dir); !errors.Is(err, ErrRunning) {
		t.Fatalf("second lock: %v; want ErrRunning", err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	sleeper, err := exec.LookPath("sleep")
	if err != nil {
		t.Skip("no sleep")
	}
	l := launch{program: sleeper, args: []string{"60"}, files: []*os.File{null, null, null, lock}}
	pid, pidfd, err := l.start()
	closeAll(l.files, nil)
	if err != nil {
		t.Fatal(err)
	}
	p, err := watch(pid, pidfd, true)
	if err != nil {
		t.Fatal(err)
	}
	defer p.release()
	if _, err := lockRunDir(dir); !errors.Is(err, ErrRunning) {
		t.Errorf("the starter let go, the child lives: %v; want ErrRunning", err)
	}
	if err := p.signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := p.wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	again, err := lockRunDir(dir)
	if err != nil {
		t.Fatalf("the child is gone: %v", err)
	}
	again.Close()
}

func TestRunDirOfOthersIsRefused(t *testing.T) {
	dir := t.TempDir() // has mode 0755 or 0777 &^ umask
	if err := os.Chmod(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	if err := prepareRunDir(dir); !errors.Is(err, ErrSpec) {
		t.Errorf("a folder that others can enter: %v", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := prepareRunDir(dir); err != nil {
		t.Error(err)
	}
}
