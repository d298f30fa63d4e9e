//go:build e2e

package e2e_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
)

func TestNbdinfoDescribesDisksAndSnapshots(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "256M")
	s.ok("fs", "mkdir", s.at("/vm1"))
	s.ok("disk", "create", s.at("/vm1/d0"), "--size", "64M")
	s.ok("disk", "create", s.at("/d1"), "--size", "1M")
	v := s.serve()
	uri := v.uri("vm1/d0")
	tool(t, "qemu-io", "-f", "raw", uri, "-c", "write -P 1 0 32M", "-c", "flush")
	s.ok("disk", "snapshot", "create", s.at("/vm1/d0"), "half full")

	type export struct {
		Size      int64 `json:"export-size"`
		ReadOnly  bool  `json:"is_read_only"`
		MultiConn bool  `json:"can_multi_conn"`
		FUA       bool  `json:"can_fua"`
		Flush     bool  `json:"can_flush"`
		Trim      bool  `json:"can_trim"`
		Zero      bool  `json:"can_zero"`
		FastZero  bool  `json:"can_fast_zero"`
		Minimum   int   `json:"block_size_minimum"`
	}
	describe := func(uri string) export {
		var info struct {
			Exports []export `json:"exports"`
		}
		if err := json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", uri)), &info); err != nil || len(info.Exports) != 1 {
			t.Fatalf("nbdinfo %s: %v, %+v", uri, err, info)
		}
		return info.Exports[0]
	}
	if got, want := describe(uri), (export{64 << 20, false, true, true, true, true, true, true, 512}); got != want {
		t.Errorf("the disk: %+v, want %+v", got, want)
	}
	snap := v.uri("vm1/d0@half%20full")
	if got := describe(snap); got.Size != 64<<20 || !got.ReadOnly || got.Trim || got.Zero || !got.MultiConn {
		t.Errorf("the snapshot: %+v", got)
	}
	for _, u := range []string{uri, snap} {
		if got := strings.Fields(tool(t, "nbdinfo", "--map", u)); strings.Join(got, " ") != "0 33554432 0 data 33554432 33554432 3 hole,zero" {
			t.Errorf("map of %s: %q", u, got)
		}
	}
	list := tool(t, "nbdinfo", "--list", "nbd+unix://?socket="+v.socket)
	for _, name := range []string{`"vm1/d0"`, `"vm1/d0@half full"`, `"d1"`} {
		if !strings.Contains(list, "export="+name) {
			t.Errorf("the list lacks %s:\n%s", name, list)
		}
	}
	if _, err := tryTool(t, "qemu-io", "-f", "raw", snap, "-c", "write 0 512"); err == nil {
		t.Error("a snapshot takes writes")
	}
	for _, name := range []string{"vm1/d9", "vm1", "vm1/d0@nope", "vm1/d0@", "../etc/passwd", ""} {
		if out, err := tryTool(t, "nbdinfo", v.uri(name)); err == nil {
			t.Errorf("export %q is there: %s", name, out)
		}
	}
	s.ok("disk", "create", s.at("/later"), "--size", "2M")
	if got := describe(v.uri("later")); got.Size != 2<<20 {
		t.Errorf("a disk made under the server: %+v", got)
	}
	v.stop()
	s.checkClean()
}

func TestServeOffersOnlyWhatItWasGiven(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "128M")
	for _, d := range []string{"/a", "/b"} {
		s.ok("disk", "create", s.at(d), "--size", "1M")
	}
	s.fails(3, "not found", "disk", "serve", s.lun, "--nbd", "unix:"+s.path("x"), "/missing")
	v := s.serve("/a", "--read-only")
	if out := tool(t, "nbdinfo", "--list", "nbd+unix://?socket="+v.socket); !strings.Contains(out, `"a"`) || strings.Contains(out, `"b"`) {
		t.Errorf("list: %s", out)
	}
	if _, err := tryTool(t, "nbdinfo", v.uri("b")); err == nil {
		t.Error("a disk that is not served can be opened")
	}
	if out := tool(t, "nbdinfo", v.uri("")); !strings.Contains(out, "is_read_only: true") {
		t.Errorf("the default export of a server with one disk, read-only: %s", out)
	}
	if _, err := tryTool(t, "qemu-io", "-f", "raw", v.uri("a"), "-c", "write 0 512"); err == nil {
		t.Error("a read-only server takes writes")
	}
	v.stop()
}

func TestNbdcopyCopiesInAndOut(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "512M")
	const size = 96 << 20
	raw, content := s.image("raw", 11, size)
	s.ok("disk", "create", s.at("/d"), "--size", "96M")
	v := s.serve()
	tool(t, "nbdcopy", "--flush", "--connections=4", raw, v.uri("d"))
	back := s.path("back")
	tool(t, "nbdcopy", "--connections=4", v.uri("d"), back)
	if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, content) {
		t.Errorf("other bytes come out than went in (%v)", err)
	}
	if k := s.disk("/d"); k.MappedBytes > 25<<20 {
		t.Errorf("%d bytes are mapped of 24 MiB of data: nbdcopy's zeros fill the disk", k.MappedBytes)
	}
	s.ok("disk", "create", s.at("/copy"), "--size", "96M")
	tool(t, "nbdcopy", v.uri("d"), v.uri("copy"))
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", raw, v.uri("copy"))
	v.stop()
	s.checkClean()
}

func TestQemuImgConvertsAndComparesThroughTheServer(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "512M")
	raw, _ := s.image("raw", 13, 64<<20)
	s.ok("disk", "create", s.at("/d"), "--size", "64M")
	v := s.serve()
	tool(t, "qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", raw, v.uri("d"))
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", raw, v.uri("d"))
	q := s.path("q.qcow2")
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", v.uri("d"), q)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, q)
	if n := allocated(t, q); n > 20<<20 {
		t.Errorf("a converted copy takes %d bytes: holes are lost", n)
	}
	v.stop()
	s.checkClean()
}

func TestQemuIoPatternsSurviveReopening(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "256M")
	s.ok("disk", "create", s.at("/d"), "--size", "64M")
	v := s.serve()
	tool(t, "qemu-io", "-f", "raw", "-d", "unmap", v.uri("d"),
		"-c", "write -P 0x11 0 8M",
		"-c", "write -P 0x22 512 512",
		"-c", "write -f -P 0x33 4095k 2k",
		"-c", "write -z 1M 64k",
		"-c", "write -z -u 2M 1M",
		"-c", "discard 4M 1M",
		"-c", "discard 6M 4k",
		"-c", "write -P 0x44 4M 4k",
		"-c", "write -P 0x55 33553920 1024",
		"-c", "flush")
	checks := []string{
		"read -P 0x11 0 512", "read -P 0x22 512 512", "read -P 0x11 1k 1047552",
		"read -P 0 1M 64k", "read -P 0x11 1088k 960k", "read -P 0 2M 1M", "read -P 0x11 3M 1046528",
		"read -P 0x33 4095k 1k", "read -P 0x44 4M 4k", "read -P 0 4100k 1020k", "read -P 0x11 5M 1M",
		"read -P 0 6M 4k", "read -P 0x11 6148k 2044k", "read -P 0 8M 16M", "read -P 0x55 33553920 1024", "read -P 0 40M 24M",
	}
	verify := func(when string, uri string) {
		args := []string{"-r", "-f", "raw", uri}
		for _, c := range checks {
			args = append(args, "-c", c)
		}
		if out := tool(t, "qemu-io", args...); strings.Contains(out, "failed") {
			t.Errorf("%s: %s", when, out)
		}
	}
	verify("at once", v.uri("d"))
	k := s.disk("/d")
	if want := int64(8<<20 - 64<<10 - 1<<20 - 1<<20 - 4<<10 + 4<<10 + 8<<10); k.MappedBytes > want+64<<10 || k.MappedBytes < want-128<<10 {
		t.Errorf("%d bytes are mapped, about %d should be", k.MappedBytes, want)
	}
	v.stop()
	v = s.serve()
	verify("after a restart", v.uri("d"))
	s.ok("disk", "snapshot", "create", s.at("/d"), "s")
	tool(t, "qemu-io", "-f", "raw", v.uri("d"), "-c", "write -P 0x77 0 48M", "-c", "discard 48M 16M")
	verify("in the snapshot", v.uri("d@s"))
	v.stop()
	s.checkClean()
}

// fio runs fio's verifying workload against an export.
func fio(t *testing.T, uri string, more ...string) {
	t.Helper()
	if out := tool(t, "fio", "--enghelp"); !strings.Contains(out, "\tnbd") {
		t.Skip("this fio has no nbd engine")
	}
	args := append([]string{"--ioengine=nbd", "--uri=" + uri, "--randseed=42", "--output-format=json", "--verify=crc32c", "--verify_fatal=1"}, more...)
	out := tool(t, "fio", args...)
	var result struct {
		Jobs []struct {
			Name  string `json:"jobname"`
			Error int    `json:"error"`
			Read  struct {
				IOs int64 `json:"total_ios"`
			} `json:"read"`
			Write struct {
				IOs int64 `json:"total_ios"`
			} `json:"write"`
			Trim struct {
				IOs int64 `json:"total_ios"`
			} `json:"trim"`
		} `json:"jobs"`
	}
	// A line of the engine precedes the JSON.
	if err := json.Unmarshal([]byte(out[max(0, strings.Index(out, "{")):]), &result); err != nil {
		t.Fatalf("fio: %v in %s", err, out)
	}
	for _, j := range result.Jobs {
		if j.Error != 0 || j.Read.IOs == 0 {
			t.Errorf("fio job %s: error %d after %d verifying reads", j.Name, j.Error, j.Read.IOs)
		}
		t.Logf("fio %s: %d writes, %d trims, %d reads verified", j.Name, j.Write.IOs, j.Trim.IOs, j.Read.IOs)
	}
}

// freePort is a TCP port that nobody listened on a moment ago.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func TestFioVerifiesOnUnixAndTCP(t *testing.T) {
	s := newSite(t, "--size", "1G")
	s.ok("disk", "create", s.at("/d"), "--size", "128M")
	port := freePort(t)
	v := s.serve("--nbd", fmt.Sprintf("tcp:127.0.0.1:%d", port))
	tcp := fmt.Sprintf("nbd://127.0.0.1:%d/d", port)

	fio(t, v.uri("d"), "--name=mixed", "--rw=randwrite", "--bssplit=512/20:4k/50:64k/20:12k/10", "--size=96m", "--iodepth=32")
	fio(t, tcp, "--name=tcp", "--rw=randwrite", "--bs=4k", "--size=64m", "--iodepth=16", "--fsync=64")
	// A trim before each write of the same block. One at a time: fio does not wait
	// for the trim, and NBD promises no order between requests in flight.
	fio(t, v.uri("d"), "--name=trim", "--rw=randtrimwrite", "--bs=4k", "--size=16m", "--iodepth=1")
	s.ok("disk", "snapshot", "create", s.at("/d"), "s")
	fio(t, v.uri("d"), "--name=after-snapshot", "--rw=randwrite", "--bsrange=512-16k", "--size=64m", "--iodepth=32")
	// Four connections at once, each in its quarter.
	fio(t, tcp, "--name=multi", "--numjobs=4", "--offset_increment=32m", "--size=16m", "--rw=randwrite", "--bs=4k", "--iodepth=8")
	v.stop()
	s.checkClean()
}

// A flush on one connection covers what another one's client was told (CAN_MULTI_CONN).
func TestFlushOnOneConnectionCoversTheOthers(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "256M")
	s.ok("disk", "create", s.at("/d"), "--size", "64M")
	v := s.serve()
	writer, flusher := openDisk(t, v.socket, "d", 0), openDisk(t, v.socket, "d", 0)
	for i := range 16 {
		writer.do("write -P %d %dM 64k", i+1, i)
	}
	flusher.do("flush")
	v.kill()
	v = s.serve()
	q := openDisk(t, v.socket, "d", 0)
	for i := range 16 {
		q.do("read -P %d %dM 64k", i+1, i)
	}
	q.close()
	v.stop()
	s.checkClean()
}

func TestSocketBelongsToWhomServeWasTold(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "64M")
	s.fails(2, "--nbd-owner", "disk", "serve", s.lun, "--nbd", "unix:"+s.path("x"), "--nbd-owner", "root")
	v := s.serve("--nbd-owner", "1234:5678")
	fi, err := os.Stat(v.socket)
	if err != nil {
		t.Fatal(err)
	}
	if st := sysStat(t, fi); fi.Mode().Perm() != 0o660 || st.Uid != 1234 || st.Gid != 5678 {
		t.Errorf("the socket has mode %v and belongs to %d:%d", fi.Mode(), st.Uid, st.Gid)
	}
	v.stop()
	if _, err := os.Stat(v.socket); !os.IsNotExist(err) {
		t.Errorf("a server that ended in order leaves its socket (%v)", err)
	}
}
