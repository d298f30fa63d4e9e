//go:build e2e

package e2e_test

import (
	"bytes"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// disk is the answer of "disk info" and an item of "disk ls".
type disk struct {
	Path           string     `json:"path"`
	SizeBytes      int64      `json:"size_bytes"`
	MappedBytes    int64      `json:"mapped_bytes"`
	ExclusiveBytes int64      `json:"exclusive_bytes"`
	SharedBytes    int64      `json:"shared_bytes"`
	Policy         string     `json:"policy"`
	LockedBy       string     `json:"locked_by"`
	UUID           string     `json:"uuid"`
	Origin         string     `json:"origin"`
	Snapshots      []snapshot `json:"snapshots"`
}

// snapshot is an item of "disk snapshot ls".
type snapshot struct {
	Name           string    `json:"name"`
	Created        time.Time `json:"created"`
	MappedBytes    int64     `json:"mapped_bytes"`
	ExclusiveBytes int64     `json:"exclusive_bytes"`
	UUID           string    `json:"uuid"`
	Published      bool      `json:"published"`
}

func (s *site) disk(path string) disk {
	s.t.Helper()
	return decode[disk](s, "disk", "info", s.at(path))
}

// allocated is the space that a file takes on its filesystem.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// image writes size bytes with holes: noise in every fourth MiB.
func (s *site) image(name string, seed uint64, size int64) (path string, content []byte) {
	s.t.Helper()
	path = s.path(name)
	content = make([]byte, size)
	f, err := os.Create(path)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		s.t.Fatal(err)
	}
	for off := int64(0); off < size; off += 4 << 20 {
		part := content[off:min(off+1<<20, size)]
		copy(part, noise(seed+uint64(off>>20), len(part)))
		if _, err := f.WriteAt(part, off); err != nil {
			s.t.Fatal(err)
		}
	}
	return path, content
}

// export reads a disk or snapshot back through "disk export".
func (s *site) export(path string) []byte {
	s.t.Helper()
	file := s.path("exported")
	s.ok("disk", "export", s.at(path), file, "--format", "raw", "--yes")
	b, err := os.ReadFile(file)
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

func TestDiskLifecycle(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "256M")
	s.ok("fs", "mkdir", s.at("/vm1"))
	s.ok("disk", "create", s.at("/vm1/d0"), "--size", "10G")
	k := s.disk("/vm1/d0")
	if k.Path != "/vm1/d0" || k.SizeBytes != 10<<30 || k.MappedBytes != 0 || k.ExclusiveBytes != 0 || k.SharedBytes != 0 ||
		k.Policy != "thin" || k.LockedBy != "" || len(k.UUID) != 36 || k.Origin != "" || len(k.Snapshots) != 0 {
		t.Errorf("a new disk is %+v", k)
	}
	s.fails(1, "exists", "disk", "create", s.at("/vm1/d0"), "--size", "1G")
	s.fails(3, "not found", "disk", "info", s.at("/vm1/d1"))
	s.fails(1, "not a disk", "disk", "info", s.at("/vm1"))
	s.fails(1, "", "fs", "cat", s.at("/vm1/d0"))
	if e := decode[entry](s, "fs", "stat", s.at("/vm1/d0")); e.Kind != "disk" || e.SizeBytes != 10<<30 {
		t.Errorf("stat of a disk: %+v", e)
	}
	s.ok("disk", "create", s.at("/top"), "--size", "512")
	var paths []string
	for _, d := range decode[items[disk]](s, "disk", "ls", s.lun).Items {
		paths = append(paths, d.Path)
	}
	if got := strings.Join(paths, " "); got != "/top /vm1/d0" {
		t.Errorf("disk ls: %s", got)
	}
	if got := decode[items[disk]](s, "disk", "ls", s.at("/vm1")).Items; len(got) != 1 || got[0].Path != "/vm1/d0" {
		t.Errorf("disk ls of a folder: %+v", got)
	}
	if got := s.ok("disk", "ls", s.lun); !strings.Contains(got, "/vm1/d0") || !strings.Contains(got, "10 GiB") {
		t.Errorf("disk ls for people: %s", got)
	}
	s.ok("fs", "mv", s.at("/vm1/d0"), s.at("/vm1/renamed"))
	s.fails(2, "--yes", "disk", "rm", s.at("/vm1/renamed"))
	s.ok("disk", "rm", s.at("/vm1/renamed"), "--yes")
	s.ok("fs", "rm", s.at("/top"), "--yes")
	s.fails(3, "not found", "disk", "rm", s.at("/vm1/renamed"), "--yes")
	if v := decode[volume](s, "fs", "df", s.lun); v.UsedBytes != 0 {
		t.Errorf("with no disk left %d bytes are in use", v.UsedBytes)
	}
	s.checkClean()
}

func TestSnapshotsAndClonesHoldTheirMoment(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "512M")
	const size = 32 << 20
	raw, first := s.image("first", 1, size)
	s.ok("disk", "import", raw, s.at("/d0"))
	s.ok("disk", "snapshot", "create", s.at("/d0"), "monday")
	s.fails(1, "exists", "disk", "snapshot", "create", s.at("/d0"), "monday")
	s.fails(2, "", "disk", "snapshot", "create", s.at("/d0"), "a/b")

	v := s.serve("d0")
	q := openDisk(t, v.socket, "d0", 0)
	q.do("write -P 0x5a 0 64k")
	q.do("write -P 0x5b 20M 1M")
	q.close()
	v.stop()
	second := bytes.Clone(first)
	copy(second, bytes.Repeat([]byte{0x5a}, 64<<10))
	copy(second[20<<20:], bytes.Repeat([]byte{0x5b}, 1<<20))
	s.ok("disk", "snapshot", "create", s.at("/d0"), "tuesday")

	if got := s.export("/d0"); !bytes.Equal(got, second) {
		t.Error("the disk does not hold its last content")
	}
	if got := s.export("/d0@monday"); !bytes.Equal(got, first) {
		t.Error("snapshot monday does not hold the first content")
	}
	list := decode[items[snapshot]](s, "disk", "snapshot", "ls", s.at("/d0")).Items
	if len(list) != 2 || list[0].Name != "monday" || list[1].Name != "tuesday" {
		t.Fatalf("snapshots: %+v", list)
	}
	if list[0].MappedBytes < 8<<20 || list[0].MappedBytes > 9<<20 {
		t.Errorf("monday maps %d bytes, 8 MiB were written", list[0].MappedBytes)
	}
	if list[0].ExclusiveBytes != 64<<10+1<<20 {
		t.Errorf("monday alone holds %d bytes; 64 KiB and 1 MiB were overwritten", list[0].ExclusiveBytes)
	}

	s.ok("fs", "mkdir", s.at("/vm2"))
	s.ok("disk", "clone", s.at("/d0@monday"), s.at("/vm2/d0"))
	if got := s.export("/vm2/d0"); !bytes.Equal(got, first) {
		t.Error("the clone does not start as its snapshot")
	}
	c := s.disk("/vm2/d0")
	if c.Origin != list[0].UUID || c.SharedBytes != c.MappedBytes || c.ExclusiveBytes != 0 || c.MappedBytes != list[0].MappedBytes {
		t.Errorf("an untouched clone is %+v; its snapshot %+v", c, list[0])
	}
	s.fails(1, "clone", "disk", "snapshot", "rm", s.at("/d0"), "monday", "--yes")
	s.fails(1, "clone", "disk", "rm", s.at("/d0"), "--yes")
	s.fails(3, "no such snapshot", "disk", "snapshot", "rm", s.at("/d0"), "sunday", "--yes")
	s.fails(3, "no such snapshot", "disk", "clone", s.at("/d0@sunday"), s.at("/x"))
	s.fails(3, "no such snapshot", "disk", "export", s.at("/d0@sunday"), s.path("x"))
	s.fails(2, "--yes", "disk", "snapshot", "rm", s.at("/d0"), "tuesday")

	s.ok("disk", "snapshot", "rm", s.at("/d0"), "tuesday", "--yes")
	if got := s.export("/d0"); !bytes.Equal(got, second) {
		t.Error("deleting a snapshot changed the disk")
	}
	s.ok("disk", "rm", s.at("/vm2/d0"), "--yes")
	s.ok("disk", "snapshot", "rm", s.at("/d0"), "monday", "--yes")
	if got := s.export("/d0"); !bytes.Equal(got, second) {
		t.Error("deleting the last snapshot changed the disk")
	}
	if k := s.disk("/d0"); len(k.Snapshots) != 0 || k.ExclusiveBytes != k.MappedBytes {
		t.Errorf("without snapshots the disk is %+v", k)
	}
	s.ok("disk", "rm", s.at("/d0"), "--yes")
	if u := decode[volume](s, "fs", "df", s.lun).UsedBytes; u != 0 {
		t.Errorf("all disks are gone and %d bytes are in use", u)
	}
	s.checkClean()
}

func TestImagesGoInAndOutWithTheirHoles(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "512M")
	const size = 64 << 20
	raw, content := s.image("raw", 7, size)
	qcow2 := s.path("in.qcow2")
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2)
	for _, c := range []struct{ name, file, format string }{
		{"raw", raw, "raw"}, {"qcow2", qcow2, "qcow2"}, {"guessed", qcow2, "auto"}, {"guessed-raw", raw, "auto"},
	} {
		s.ok("disk", "import", c.file, s.at("/"+c.name), "--format", c.format)
		k := s.disk("/" + c.name)
		if k.SizeBytes != size || k.MappedBytes < 16<<20 || k.MappedBytes > 17<<20 {
			t.Errorf("%s: %d bytes with %d mapped; the image holds 16 MiB of data", c.name, k.SizeBytes, k.MappedBytes)
		}
		if got := s.export("/" + c.name); !bytes.Equal(got, content) {
			t.Errorf("%s: other bytes come out than went in", c.name)
		}
		if n := allocated(t, s.path("exported")); n > 20<<20 {
			t.Errorf("%s: the raw export takes %d bytes: its holes are filled", c.name, n)
		}
	}
	out := s.path("out.qcow2")
	s.ok("disk", "export", s.at("/raw"), out, "--format", "qcow2")
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, out)
	if n := allocated(t, out); n > 20<<20 {
		t.Errorf("the qcow2 export takes %d bytes: its holes are filled", n)
	}
	s.fails(2, "--yes", "disk", "export", s.at("/raw"), out, "--format", "qcow2")
	s.fails(1, "exists", "disk", "import", raw, s.at("/raw"))
	s.checkClean()
}

func TestImagesOfOddSizeAreRoundedUpToASector(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "128M")
	for _, size := range []int{1, 511, 512, 513, 4095, 4097, 1<<20 + 1, 3<<20 - 100} {
		want := noise(uint64(size), size)
		raw := s.file("odd", want)
		s.ok("disk", "import", raw, s.at("/odd"), "--format", "raw")
		round := (size + 511) / 512 * 512
		if k := s.disk("/odd"); k.SizeBytes != int64(round) {
			t.Errorf("%d bytes become a disk of %d", size, k.SizeBytes)
		}
		if got := s.export("/odd"); !bytes.Equal(got, append(want, make([]byte, round-size)...)) {
			t.Errorf("%d bytes: others come out than went in", size)
		}
		s.ok("disk", "rm", s.at("/odd"), "--yes")
	}
}

func TestForeignImagesThatReachFurtherAreRefused(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "128M")
	secret := s.file("secret", noise(3, 1<<20))
	backed, data := s.path("backed.qcow2"), s.path("data.qcow2")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", backed)
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file="+s.path("data.raw"), data, "1M")
	s.fails(1, "flatten", "disk", "import", backed, s.at("/x"))
	s.fails(1, "flatten", "disk", "import", data, s.at("/x"))
	vmdk := s.path("x.vmdk")
	tool(t, "qemu-img", "create", "-q", "-f", "vmdk", vmdk, "1M")
	s.fails(2, "vmdk", "disk", "import", vmdk, s.at("/x"))
	s.fails(3, "no such file", "disk", "import", s.path("missing"), s.at("/x"))
	s.fails(1, "", "disk", "import", secret, s.at("/x"), "--format", "qcow2")
	// Names that qemu-img would take for protocols or options.
	for _, name := range []string{"json:{}", "nbd:x", "-f"} {
		path := s.file(name, noise(4, 4096))
		s.ok("disk", "import", path, s.at("/named"), "--format", "raw")
		s.ok("disk", "rm", s.at("/named"), "--yes")
	}
	if got := s.names("/"); got != "" {
		t.Errorf("refused imports left %q", got)
	}
	s.checkClean()
}
