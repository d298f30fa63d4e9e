//go:build e2e

package e2e_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// hosts lists the slots in use.
func (s *site) hosts() map[string]hostView {
	s.t.Helper()
	found := make(map[string]hostView)
	for _, h := range decode[items[hostView]](s, "fs", "hosts", s.lun).Items {
		found[h.Name] = h
	}
	return found
}

// apart is the site as another machine would see it: it does not find the first
// one's control sockets.
func (s *site) apart(host string) *site {
	s.t.Helper()
	other := s.as(host)
	other.dir = s.path("machine-" + host)
	if err := os.MkdirAll(other.dir, 0o700); err != nil {
		s.t.Fatal(err)
	}
	return other
}

// sum is a digest of every byte of the LUN.
func (s *site) sum() [sha256.Size]byte {
	s.t.Helper()
	f, err := os.Open(s.lun)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		s.t.Fatal(err)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

func TestLiveHolderKeepsItsDisk(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "128M", "--lease", "3s")
	s.ok("disk", "create", s.at("/d"), "--size", "16M")
	v := s.serve()
	q := openDisk(t, v.socket, "d", 0)
	q.do("write -P 1 0 64k")
	b := s.apart("b")
	b.fails(4, `held by host "a"`, "disk", "rm", s.at("/d"), "--yes")
	b.fails(4, `held by host "a"`, "disk", "snapshot", "create", s.at("/d"), "s")
	b.fails(4, `held by host "a"`, "disk", "export", s.at("/d"), s.path("x"))
	s.as("c").fails(4, "in use", "disk", "rm", s.at("/d"), "--yes")
	s.as("c").fails(4, "snapshot", "disk", "export", s.at("/d"), s.path("x"))
	b.fails(4, "basalt fs confirm-down", "fs", "create", s.lun, "--yes")
	if h := s.hosts()["a"]; h.State != "alive" || !h.Server || h.Fencing != "ofd" || h.Locks != 1 || h.PID != v.cmd.Process.Pid {
		t.Errorf("fs hosts says %+v", h)
	}
	if k := b.disk("/d"); k.LockedBy != "a" {
		t.Errorf("disk info says that %q has it", k.LockedBy)
	}
	s.as("c").ok("disk", "snapshot", "create", s.at("/d"), "s")
	s.as("c").ok("disk", "export", s.at("/d@s"), s.path("snapshot"))
	q.do("read -P 1 0 64k")
	q.close()
	eventually(t, 10*time.Second, "the lock goes with the last connection", func() bool { return s.disk("/d").LockedBy == "" })
	b.ok("disk", "rm", s.at("/d"), "--yes")
	v.stop()
	if h := s.hosts(); len(h) != 0 {
		t.Errorf("after all have left, fs hosts says %+v", h)
	}
	s.checkClean()
}

func TestTwoServersOfOneNameAreRefused(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "64M", "--lease", "3s")
	v := s.serve()
	for _, from := range []*site{s.as("a"), s.apart("a")} {
		r := from.run("disk", "serve", s.lun, "--nbd", "unix:"+from.path("second"))
		if r.code != 4 || !strings.Contains(r.err, "--host-name") {
			t.Errorf("a second server named a: exit code %d: %s", r.code, r.err)
		}
		t.Logf("exit %d: %s", r.code, strings.TrimSpace(r.err))
	}
	s.ok("fs", "mkdir", s.at("/verbs-of-the-same-name-are-fine"))
	long := s.as(strings.Repeat("h", 100)) // longer than a socket's address
	w := start(t, "server with a long name", long.command(t.Context(), "disk", "serve", s.lun, "--nbd", "unix:"+s.path("long")))
	w.says(30*time.Second, " serves on ")
	r := s.run("disk", "serve", s.lun, "--nbd", "unix:"+v.socket)
	if r.code == 0 || !strings.Contains(r.err, "listens") {
		t.Errorf("a second server on one socket: exit code %d: %s", r.code, r.err)
	}
	v.stop()
}

// The lease of a minute is never waited for: the kernel says that the holder is gone.
func TestKilledHostIsTakenOverAtOnce(t *testing.T) {
	s := newSite(t, "--size", "256M", "--lease", "60s")
	s.ok("disk", "create", s.at("/d"), "--size", "64M")
	v := s.serve()
	q := openDisk(t, v.socket, "d", 0)
	q.do("write -P 1 0 1M")
	q.do("flush")
	q.do("write -P 2 1M 1M") // acknowledged, not flushed
	v.kill()
	if h := s.hosts()["a"]; h.State != "gone" {
		t.Errorf("fs hosts says %+v of a killed host", h)
	}
	w := s.apart("b").serve()
	var b *qemuIO
	d := took(func() { b = openDisk(t, w.socket, "d", 0) })
	if d > 20*time.Second {
		t.Errorf("the takeover took %v", d)
	}
	b.do("read -P 1 0 1M")
	b.do("read -P 2 1M 1M")
	b.do("write -P 3 0 64k")
	b.close()
	t.Logf("the killed host's disk was open after %v, with a lease of 60s", d)
	s.ok("disk", "snapshot", "create", s.at("/d"), "verbs-break-the-dead-too")
	w.stop()
	s.checkClean()
}

func TestShortFreezeCostsOnlyAPause(t *testing.T) {
	s := newSite(t, "--size", "128M", "--lease", "8s")
	s.ok("disk", "create", s.at("/d"), "--size", "16M")
	v := s.serve()
	q := openDisk(t, v.socket, "d", 0)
	q.do("write -P 1 0 1M")
	before := s.hosts()["a"]
	v.freeze()
	q.send("write -P 2 1M 1M")
	wait(2 * time.Second)
	v.signal(syscall.SIGCONT)
	if said, ok := q.answer(10 * time.Second); !ok || !succeeded(said) {
		t.Fatalf("the write under way: %q", said)
	}
	q.do("read -P 1 0 1M")
	q.do("read -P 2 1M 1M")
	if now := s.hosts()["a"]; now.Generation != before.Generation || now.Slot != before.Slot || now.State != "alive" {
		t.Errorf("was %+v, is %+v", before, now)
	}
	q.close()
	v.stop()
	s.checkClean()
}

// A lease that nobody contests comes back: a stall of the machine kills no one.
func TestFreezeBeyondTheLeaseResumesWhenNobodyBreaks(t *testing.T) {
	s := newSite(t, "--size", "128M", "--lease", "3s")
	s.ok("disk", "create", s.at("/d"), "--size", "16M")
	v := s.serve()
	q := openDisk(t, v.socket, "d", 0)
	q.do("write -P 1 0 1M")
	before := s.hosts()["a"]
	v.freeze()
	q.send("write -P 2 1M 1M")
	wait(7 * time.Second)
	if h := s.hosts()["a"]; h.State != "silent" {
		t.Errorf("fs hosts says %q of a frozen host", h.State)
	}
	if k := s.disk("/d"); k.LockedBy != "a" {
		t.Errorf("a frozen host's disk is held by %q", k.LockedBy)
	}
	v.signal(syscall.SIGCONT)
	if said, ok := q.answer(15 * time.Second); !ok || !succeeded(said) {
		t.Fatalf("the write under way: %q", said)
	}
	q.do("read -P 1 0 1M")
	q.do("read -P 2 1M 1M")
	v.says(time.Second, "lease has ended")
	if now := s.hosts()["a"]; now.Generation != before.Generation || now.State != "alive" {
		t.Errorf("was %+v, is %+v", before, now)
	}
	q.close()
	v.stop()
	s.checkClean()
}

func TestFrozenHostIsKilledWhenItsDiskIsNeeded(t *testing.T) {
	s := newSite(t, "--size", "128M", "--lease", "3s")
	s.ok("disk", "create", s.at("/d"), "--size", "16M")
	v := s.serve()
	q := openDisk(t, v.socket, "d", 0)
	q.do("write -P 1 0 1M")
	v.freeze()
	q.send("write -P 2 0 1M") // reaches a socket that nobody reads
	w := s.apart("b").serve()
	var b *qemuIO
	d := took(func() { b = openDisk(t, w.socket, "d", 0) })
	v.ends(10 * time.Second)
	if v.killedBy() != syscall.SIGKILL {
		t.Errorf("the frozen host ended as %v", v.cmd.ProcessState)
	}
	if d < 2*time.Second {
		t.Errorf("a host that might thaw was cut off after %v, before its lease of 3s had ended", d)
	}
	b.do("read -P 1 0 1M")
	b.do("write -P 3 0 1M")
	b.close()
	w.stop()
	q = openDisk(t, s.serve().socket, "d", 0)
	q.do("read -P 3 0 1M")
	t.Logf("frozen host killed and its disk open after %v", d)
	s.checkClean()
}

// stranger starts a server in a pid namespace of its own: nobody else can verify
// its process, so nobody may kill it.
func (s *site) stranger() *server {
	s.t.Helper()
	if os.Geteuid() != 0 {
		s.t.Skip("a pid namespace needs root")
	}
	socket := s.path(s.host + ".nbd")
	inner := s.command(context.Background(), "disk", "serve", s.lun, "--nbd", "unix:"+socket)
	cmd := exec.Command("/bin/sh", append([]string{"-c", `mount -t proc proc /proc && exec "$0" "$@"`}, inner.Args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Unshareflags: syscall.CLONE_NEWNS}
	v := &server{start(s.t, "stranger "+s.host, cmd), socket}
	v.says(30*time.Second, " serves on ")
	return v
}

// endsCutOff waits for a server that has found out that its generation is lost.
func (v *server) endsCutOff() {
	v.t.Helper()
	code := v.ends(20 * time.Second)
	if said := strings.Join(v.said(), "\n"); code != 4 || !strings.Contains(said, "basalt: store: this host was cut off from the volume") {
		v.t.Errorf("the thawed host ends with exit code %d:\n%s", code, said)
	}
}

func TestHostThatThawsAfterKillWritesNothingMore(t *testing.T) {
	s := newSite(t, "--size", "128M", "--lease", "3s")
	s.ok("disk", "create", s.at("/d"), "--size", "16M")
	v := s.stranger()
	q := openDisk(t, v.socket, "d", 0)
	q.do("write -P 1 0 1M")
	q.do("flush")
	q.send("aio_write -P 2 0 1M")
	q.send("aio_write -P 2 4M 1M")
	v.freeze()
	b := s.apart("b")
	b.fails(4, "confirm-down", "disk", "rm", s.at("/d"), "--yes")
	if h := s.hosts()["a"]; h.State != "killed" {
		t.Errorf("fs hosts says %+v after KILL", h)
	}
	before := s.sum()
	v.signal(syscall.SIGCONT)
	v.endsCutOff()
	if s.sum() != before {
		t.Error("the thawed host wrote to the LUN after KILL")
	}
	d := took(func() { b.ok("disk", "snapshot", "create", s.at("/d"), "s") })
	if d > 3*time.Second { // less than the lease, which a new window would take
		t.Errorf("with the old holder gone the takeover took %v", d)
	}
	s.checkClean()
	t.Logf("after the thaw the disk was free in %v", d)
}

func TestPersonConfirmsThatAHostIsDown(t *testing.T) {
	s := newSite(t, "--size", "128M", "--lease", "3s")
	s.ok("disk", "create", s.at("/d"), "--size", "16M")
	s.fails(3, "no slot", "fs", "confirm-down", s.lun, "a", "--yes")
	v := s.stranger()
	b := s.apart("b")
	q := openDisk(t, v.socket, "d", 0)
	q.do("write -P 1 0 1M")
	b.fails(2, "--yes", "fs", "confirm-down", s.lun, "a")
	b.fails(4, "alive", "fs", "confirm-down", s.lun, "a", "--yes")
	q.do("write -P 2 1M 1M") // the word of a person who is wrong changes nothing
	v.freeze()
	q.send("write -P 9 0 1M")
	b.fails(4, "confirm-down", "disk", "rm", s.at("/d"), "--yes")
	b.ok("fs", "confirm-down", s.lun, "a", "--yes")
	b.ok("disk", "snapshot", "create", s.at("/d"), "after")
	before := s.sum()
	v.signal(syscall.SIGCONT)
	v.endsCutOff()
	if s.sum() != before {
		t.Error("a host that was declared down wrote to the LUN when it thawed")
	}
	w := b.serve()
	r := openDisk(t, w.socket, "d", 0)
	r.do("read -P 1 0 1M")
	r.do("read -P 2 1M 1M")
	r.close()
	w.stop()
	s.checkClean()
}

// A child that outlives its parent must not keep the parent's lock on the LUN.
func TestChildOfAKilledHostDoesNotBlockTheTakeover(t *testing.T) {
	s := newSite(t, "--size", "1G", "--lease", "60s")
	raw := s.file("raw", noise(5, 384<<20))
	imp := start(t, "import", s.command(t.Context(), "disk", "import", raw, s.at("/d"), "--format", "raw"))
	child := 0
	eventually(t, 20*time.Second, "qemu-img copies", func() bool {
		for _, pid := range children(t, imp.cmd.Process.Pid) {
			line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if err == nil && strings.Contains(string(line), "convert") {
				child = pid
			}
		}
		return child != 0
	})
	if err := syscall.Kill(child, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Kill(child, syscall.SIGKILL) }() // it may have ended
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", child))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", child, f.Name())); err == nil && to == s.lun {
			t.Errorf("descriptor %s of qemu-img is the LUN", f.Name())
		}
	}
	imp.signal(syscall.SIGKILL)
	imp.awaitZombie()
	b := s.apart("b")
	left := decode[items[disk]](b, "disk", "ls", s.lun).Items
	if len(left) != 1 || !strings.HasPrefix(left[0].Path, "/.d.import-") {
		t.Fatalf("a killed import left %+v, want a disk that says what it is", left)
	}
	d := took(func() { b.ok("disk", "rm", s.at(left[0].Path), "--yes") })
	if d > 20*time.Second {
		t.Errorf("the takeover took %v", d)
	}
	if state := stateOf(child); state != "T" {
		t.Errorf("the child was meant to live on, it is %q", state)
	}
	if u := decode[volume](s, "fs", "df", s.lun).UsedBytes; u != 0 {
		t.Errorf("%d bytes of the removed disk are in use", u)
	}
	s.checkClean()
	t.Logf("the half-imported disk was taken over and removed after %v, with qemu-img still there", d)
}

// A verb must not wait for ever for a host on this machine that hangs.
func TestVerbsDoNotHangOnAFrozenHost(t *testing.T) {
	s := newSite(t, "--size", "128M", "--lease", "3s")
	s.ok("disk", "create", s.at("/d"), "--size", "16M")
	v := s.serve()
	q := openDisk(t, v.socket, "d", 0)
	q.do("write -P 1 0 1M")
	v.freeze()
	for _, args := range [][]string{
		{"disk", "info", s.at("/d")}, {"disk", "ls", s.lun}, {"fs", "ls", s.lun}, {"fs", "hosts", s.lun}, {"fs", "info", s.lun},
	} {
		d := took(func() { s.as("c").ok(args...) })
		t.Logf("%v: %v", args[:2], d)
	}
	v.signal(syscall.SIGCONT)
	q.do("read -P 1 0 1M")
	q.close()
	v.stop()
}

// A verb that needs the disk of a frozen server on its own machine does not wait
// for the server: it cuts it off as any other host would.
func TestVerbOnAFrozenServersDiskCutsItOff(t *testing.T) {
	s := newSite(t, "--size", "128M", "--lease", "3s")
	s.ok("disk", "create", s.at("/d"), "--size", "16M")
	v := s.serve()
	q := openDisk(t, v.socket, "d", 0)
	q.do("write -P 1 0 1M")
	v.freeze()
	d := took(func() { s.as("c").ok("disk", "snapshot", "create", s.at("/d"), "s") })
	v.ends(10 * time.Second)
	if v.killedBy() != syscall.SIGKILL {
		t.Errorf("the frozen server ended as %v", v.cmd.ProcessState)
	}
	w := s.serve()
	r := openDisk(t, w.socket, "d", 0)
	r.do("read -P 1 0 1M")
	r.close()
	w.stop()
	s.checkClean()
	t.Logf("the snapshot of a frozen server's disk was there after %v", d)
}
