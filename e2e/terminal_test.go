//go:build e2e

package e2e_test

import (
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal opens a pseudo-terminal: what a person sees and types, and what the
// program gets.
func terminal(t *testing.T) (person, program *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals: %v", err)
	}
	t.Cleanup(func() { person.Close() })
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	return person, program
}

func TestPersonIsAskedBeforeDataIsDestroyed(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "64M")
	s.okWith([]byte("precious"), "fs", "put", "-", s.at("/f"))
	for _, c := range []struct {
		typed string
		code  int
		gone  bool
	}{
		{"no\n", 2, false}, {"\n", 2, false}, {"YES\n", 2, false}, {"yes please\n", 2, false}, {"yes\n", 0, true},
	} {
		person, program := terminal(t)
		cmd := s.command(t.Context(), "fs", "rm", s.at("/f"))
		cmd.Stdin = program
		p := start(t, "rm", cmd)
		if _, err := io.WriteString(person, c.typed); err != nil {
			t.Fatal(err)
		}
		if code := p.ends(30 * time.Second); code != c.code {
			t.Errorf("%q typed: exit code %d, want %d: %q", c.typed, code, c.code, p.said())
		}
		if said := strings.Join(p.said(), " "); !strings.Contains(said, "remove "+s.at("/f")) || !strings.Contains(said, "Type yes") {
			t.Errorf("the question was %q", said)
		}
		if got := s.names("/"); (got == "") != c.gone {
			t.Errorf("%q typed: the folder holds %q", c.typed, got)
		}
	}
}
