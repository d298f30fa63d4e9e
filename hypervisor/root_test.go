package hypervisor

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
)

// launchConfined runs a program in a root of its own and returns what it printed.
func launchConfined(t *testing.T, program string, args ...string) (string, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer r.Close()
	s := Spec{UID: 2000019, GID: 2000019}
	l := launch{program: program, args: args, files: []*os.File{null, w, w}, uid: s.UID, gid: s.GID,
		root: planRoot(t.TempDir(), s, Accel{Kind: TCG}, Options{})}
	pid, pidfd, err := l.start()
	closeAll(l.files, nil)
	if err != nil {
		return "", err
	}
	p, err := watch(pid, pidfd, true)
	if err != nil {
		return "", err
	}
	defer p.release()
	out, err := io.ReadAll(r)
	if err != nil {
		return "", err
	}
	exit, err := p.wait(t.Context())
	if err == nil && exit != (Exit{Known: true}) {
		err = errors.New(exit.String())
	}
	return string(out), err
}

func TestConfinedProcessSeesALittleReadOnlyRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	out, err := launchConfined(t, "/bin/sh", "-c", "echo /*; echo /dev/*; id -u; id -G; touch /x /usr/x /dev/x 2>/dev/null; echo $?")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 5 {
		t.Fatalf("output %q", out)
	}
	for _, forbidden := range []string{"/proc", "/home", "/root", "/tmp", "/var", "/run", "/sys"} {
		if strings.Contains(" "+lines[0]+" ", " "+forbidden+" ") {
			t.Errorf("the root holds %s: %s", forbidden, lines[0])
		}
	}
	if lines[1] != "/dev/null /dev/random /dev/urandom /dev/zero" {
		t.Errorf("devices: %s", lines[1])
	}
	if lines[2] != "2000019" || lines[3] != "2000019" || lines[4] != "1" {
		t.Errorf("uid %s, groups %s, writing fails with %s", lines[2], lines[3], lines[4])
	}
}

func TestLaunchLeavesTheStarterAsItWas(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	truth, err := exec.LookPath("true")
	if err != nil {
		t.Skip("no true")
	}
	// In /proc the process is its main thread, which must not be one of those that
	// were thrown away.
	look := func() string {
		var b strings.Builder
		for _, name := range []string{"ns/mnt", "ns/net", "ns/ipc", "ns/uts", "root", "cwd"} {
			link, err := os.Readlink("/proc/self/" + name)
			if err != nil {
				t.Fatal(err)
			}
			b.WriteString(link + " ")
		}
		return b.String()
	}
	before := look()
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 5 {
				if _, err := launchConfined(t, truth); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if after := look(); after != before {
		t.Errorf("was %s\nis  %s", before, after)
	}
}
