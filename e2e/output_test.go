//go:build e2e

package e2e_test

import (
	"os"
	"os/exec"
	"sync"
	"testing"
)

// What a command is told to write replaces a file only when it is whole.
func TestFailedCommandsKeepTheFileThatTheyWouldReplace(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "128M")
	s.ok("disk", "create", s.at("/d"), "--size", "8M")
	precious := s.file("precious", []byte("precious"))
	want := func(after string) {
		t.Helper()
		if got, err := os.ReadFile(precious); err != nil || string(got) != "precious" {
			t.Errorf("%s: the file holds %q (%v)", after, got, err)
		}
		if entries, err := os.ReadDir(s.dir); err != nil || len(entries) != 2 {
			t.Errorf("%s: %d files lie about, want the LUN and one (%v)", after, len(entries), err)
		}
	}
	s.fails(3, "not found", "fs", "get", s.at("/nosuch"), precious, "--yes")
	want("get of nothing")
	s.fails(1, "it is a disk", "fs", "get", s.at("/d"), precious, "--yes")
	want("get of a disk")
	s.fails(3, "not found", "disk", "export", s.at("/nosuch"), precious, "--yes")
	want("export of nothing")
	s.fails(3, "no such snapshot", "disk", "export", s.at("/d@none"), precious, "--yes")
	want("export of no snapshot")
	s.fails(2, "not a regular file", "fs", "get", s.at("/d"), "/dev/null", "--yes")
}

// A LUN with a volume on it is never taken for a file to be overwritten.
func TestVolumesAreNotOverwrittenByExports(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "128M")
	s.ok("disk", "create", s.at("/d"), "--size", "8M")
	s.okWith([]byte("content"), "fs", "put", "-", s.at("/f"))
	other := newSite(t, "--size", "128M")
	for _, lun := range []string{s.lun, other.lun} {
		s.fails(2, "is not overwritten", "disk", "export", s.at("/d"), lun, "--yes")
		s.fails(2, "is not overwritten", "fs", "get", s.at("/f"), lun, "--yes")
	}
	s.checkClean()
	other.checkClean()
}

// A client finds its disk by its path again, so that a disk in use keeps it.
func TestDiskInUseKeepsItsName(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "128M", "--lease", "3s")
	s.ok("fs", "mkdir", "-p", s.at("/a/b"))
	s.ok("disk", "create", s.at("/a/b/d"), "--size", "8M")
	v := s.serve()
	q := openDisk(t, v.socket, "a/b/d", 0)
	q.do("write -P 1 0 64k")
	s.as("b").fails(4, "held by host", "fs", "mv", s.at("/a/b/d"), s.at("/a/b/e"))
	s.as("b").fails(4, "held by host", "fs", "mv", s.at("/a"), s.at("/z"))
	q.do("read -P 1 0 64k")
	q.close()
	v.stop()
	s.ok("fs", "mv", s.at("/a"), s.at("/z"))
	s.checkClean()
}

// Of several that make a volume on one LUN at once, one does, and the volume is whole.
func TestVolumeIsMadeByOneAtATime(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "128M")
	for range 5 {
		var all sync.WaitGroup
		codes := make([]int, 3)
		for i := range codes {
			all.Go(func() {
				cmd := exec.CommandContext(t.Context(), builtProgram(t), "fs", "create", s.lun, "--yes")
				_ = runToItsEnd(cmd) // the exit code tells
				codes[i] = cmd.ProcessState.ExitCode()
			})
		}
		all.Wait()
		made := 0
		for _, c := range codes {
			switch c {
			case 0:
				made++
			case 4:
			default:
				t.Errorf("exit codes %v", codes)
			}
		}
		if made == 0 {
			t.Errorf("nobody made the volume: exit codes %v", codes)
		}
		s.checkClean()
	}
}
