//go:build e2e

package e2e_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestFullVolumeTellsAndRecovers(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "128M")
	ballast := noise(1, 40<<20)
	s.okWith(ballast, "fs", "put", "-", s.at("/ballast"))
	s.ok("disk", "create", s.at("/d"), "--size", "1G")
	v := s.serve()
	q := openDisk(t, v.socket, "d", 0)
	written := 0
	for ; written < 1024; written++ {
		said, ok := q.try(commandTimeout, "write -P %d %dM 1M", written%250+1, written)
		if !ok {
			t.Fatal("no answer to a write on a full volume")
		}
		if !succeeded(said) {
			if !strings.Contains(said, "No space left on device") {
				t.Fatalf("a full volume is told as %q", said)
			}
			break
		}
	}
	if written == 0 || written >= 128 {
		t.Fatalf("%d MiB fit on a volume of 128 MiB", written)
	}
	q.do("flush") // what was acknowledged is made durable on the full volume
	verify := func() {
		t.Helper()
		for i := range written {
			q.do("read -P %d %dM 1M", i%250+1, i)
		}
	}
	verify()
	q.do("write -P 7 0 64k") // in place: needs no space
	q.do("write -P 1 0 64k")
	s.fails(5, "full", "fs", "put", s.file("more", noise(2, 4<<20)), s.at("/more"))
	raw := s.file("raw", noise(3, 8<<20))
	s.fails(5, "", "disk", "import", raw, s.at("/more"), "--format", "raw")
	if got := s.names("/"); got != "ballast d" {
		t.Errorf("refused files left %q", got)
	}
	if got := s.ok("fs", "cat", s.at("/ballast")); got != string(ballast) {
		t.Error("the file beside the full disk holds other bytes")
	}
	s.checkClean()

	// Discards and removals work on a full volume and make room.
	q.do("discard %dM 1M", written-1)
	q.do("flush")
	s.ok("fs", "rm", s.at("/ballast"), "--yes")
	for i := written - 1; i < written+16; i++ {
		q.do("write -P %d %dM 1M", i%250+1, i)
	}
	written += 16
	verify()
	q.close()
	v.stop()
	s.okWith(noise(2, 4<<20), "fs", "put", "-", s.at("/more"))
	s.checkClean()
	t.Logf("ENOSPC to the client, exit 5 to the CLI; after the removal %d MiB verify", written)
}

func TestFullVolumeCanBeEmptied(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "64M")
	s.ok("disk", "create", s.at("/d"), "--size", "1G")
	v := s.serve()
	tool(t, "nbdinfo", v.uri("d"))
	if _, err := tryTool(t, "qemu-io", "-f", "raw", v.uri("d"), "-c", "write -P 1 0 128M"); err == nil {
		t.Error("128 MiB fit on a volume of 64")
	}
	s.fails(5, "", "fs", "put", s.file("f", noise(1, 1<<20)), s.at("/f"))
	v.stop()
	s.checkClean()
	s.ok("disk", "rm", s.at("/d"), "--yes")
	if u := decode[volume](s, "fs", "df", s.lun).UsedBytes; u != 0 {
		t.Errorf("%d bytes are in use after everything was removed", u)
	}
	s.checkClean()
}

// smallFilesystem mounts a filesystem of its own for the LUN.
func smallFilesystem(t *testing.T, kind string, sizeMiB int) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir, err := os.MkdirTemp("", "e2efs")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	var out []byte
	switch kind {
	case "tmpfs":
		err = unix.Mount("none", dir, "tmpfs", 0, fmt.Sprintf("size=%dm", sizeMiB))
	default:
		image := dir + ".img"
		t.Cleanup(func() { os.Remove(image) })
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(image, int64(sizeMiB)<<20); err != nil {
			t.Fatal(err)
		}
		tool(t, "mkfs.ext4", "-q", "-m", "0", image)
		out, err = exec.Command("mount", "-o", "loop", image, dir).CombinedOutput()
	}
	if err != nil {
		t.Skipf("mount a %s: %v: %s", kind, err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// A sparse LUN promises more than its filesystem has.
func TestFullFilesystemUnderASparseLUN(t *testing.T) {
	for _, kind := range []string{"tmpfs", "ext4"} {
		t.Run(kind, func(t *testing.T) {
			s := emptySite(t)
			mnt := smallFilesystem(t, kind, 160)
			s.lun = mnt + "/lun"
			s.ok("fs", "create", s.lun, "--size", "1G", "--lease", "60s")
			s.ok("disk", "create", s.at("/d"), "--size", "512M")
			v := s.serve()
			q := openDisk(t, v.socket, "d", 0)
			q.do("write -P 9 0 8M")
			q.do("flush")
			ballast := fill(t, mnt+"/ballast")
			acked := 8
			for ; ; acked++ {
				if acked > 400 {
					t.Fatal("the filesystem never filled up")
				}
				said, ok := q.try(commandTimeout, "write -P %d %dM 1M", acked%250+1, acked)
				if !ok {
					t.Fatal("no answer to a write on a full filesystem")
				}
				if !succeeded(said) {
					if !strings.Contains(said, "No space left on device") {
						t.Fatalf("a full filesystem is told as %q", said)
					}
					break
				}
			}
			verify := func(when string) {
				t.Helper()
				q.do("read -P 9 0 8M")
				for i := 8; i < acked; i++ {
					if said, ok := q.try(commandTimeout, "read -P %d %dM 1M", i%250+1, i); !ok || !succeeded(said) {
						t.Fatalf("%s: MiB %d, acknowledged: %q", when, i, said)
					}
				}
			}
			verify("while it is full")
			q.do("write -P 9 0 1M") // in place
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
			// The same client goes on, without a restart of anything.
			for i := range 16 {
				q.do("write -P %d %dM 1M", (acked+i)%250+1, acked+i)
			}
			acked += 16
			q.do("flush")
			verify("after space came back")
			q.close()
			v.stop()
			s.checkClean()
			v = s.serve()
			q = openDisk(t, v.socket, "d", 0)
			verify("after a restart")
			q.close()
			v.stop()
			t.Logf("%s: ENOSPC after %d MiB, then on to %d MiB", kind, acked-16, acked)
		})
	}
}

// fill writes a file until nothing more fits, but for a few MiB.
func fill(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		t.Fatal(err)
	}
	chunk := bytes.Repeat([]byte{0xee}, 1<<20)
	for left := int64(st.Bavail)*st.Bsize - 6<<20; left > 0; left -= 1 << 20 {
		if _, err := f.Write(chunk); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	return path
}

// A server that was killed while its filesystem was full recovers on the full
// filesystem or says that it cannot, and loses nothing either way.
func TestServerKilledOnAFullFilesystemLosesNothing(t *testing.T) {
	s := emptySite(t)
	mnt := smallFilesystem(t, "ext4", 160)
	s.lun = mnt + "/lun"
	s.ok("fs", "create", s.lun, "--size", "1G", "--lease", "60s")
	s.ok("disk", "create", s.at("/d"), "--size", "512M")
	v := s.serve()
	q := openDisk(t, v.socket, "d", time.Minute)
	ballast := fill(t, mnt+"/ballast")
	acked := 0
	for ; acked < 400; acked++ {
		if said, ok := q.try(commandTimeout, "write -P %d %dM 1M", acked%250+1, acked); !ok || !succeeded(said) {
			break
		}
	}
	if acked == 0 || acked == 400 {
		t.Fatalf("%d MiB fit", acked)
	}
	v.kill()
	v = s.serve()
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	for i := range acked {
		q.do("read -P %d %dM 1M", i%250+1, i)
	}
	q.do("write -P 200 %dM 8M", acked)
	q.do("flush")
	q.do("read -P 200 %dM 8M", acked)
	q.close()
	v.stop()
	s.checkClean()
}
