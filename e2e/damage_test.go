//go:build e2e

package e2e_test

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"os"
	"strings"
	"testing"
	"time"

	"basalt/block/unit"
)

// Places in the format (docs/format) that the tests damage.
const (
	superblockBytes = 4096
	superblockMagic = "BASALTFS" // at byte 8
	logMagic        = "BLOG"     // at byte 4 of a record
	headerMagic     = "BHDR"     // at byte 4 of an object's header
	versionOff      = 4          // of a superblock
)

// findAll looks for a mark at byte off of every block of 4 KiB of the LUN.
func (s *site) findAll(mark string, off int) []int64 {
	s.t.Helper()
	b := s.bytes()
	var at []int64
	for block := 0; block+4096 <= len(b); block += 4096 {
		if string(b[block+off:block+off+len(mark)]) == mark {
			at = append(at, int64(block))
		}
	}
	return at
}

// bytes reads the whole LUN.
func (s *site) bytes() []byte {
	s.t.Helper()
	b, err := os.ReadFile(s.lun)
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

// change edits n bytes of the LUN in place.
func (s *site) change(off int64, n int, edit func(b []byte)) {
	s.t.Helper()
	f, err := os.OpenFile(s.lun, os.O_RDWR, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, off); err != nil {
		s.t.Fatal(err)
	}
	edit(b)
	if _, err := f.WriteAt(b, off); err != nil {
		s.t.Fatal(err)
	}
}

// flip turns one bit.
func (s *site) flip(off int64) {
	s.t.Helper()
	s.change(off, 1, func(b []byte) { b[0] ^= 0x10 })
}

// damaged demands that check says so, in the given words, in text and in JSON.
func (s *site) damaged(says string) {
	s.t.Helper()
	r := s.run("fs", "check", s.lun)
	if r.code != 6 || !strings.Contains(r.out+r.err, says) || strings.Count(r.err, "\n") != 1 {
		s.t.Errorf("check: exit code %d, want 6 and %q: %s%s", r.code, says, r.out, r.err)
	}
	if j := s.run("fs", "check", s.lun, "--json"); j.code != 6 || !strings.Contains(j.out, `"damage"`) && r.out != "" {
		s.t.Errorf("check --json: exit code %d: %s%s", j.code, j.out, j.err)
	}
	s.t.Logf("exit %d: %s", r.code, strings.TrimSpace(r.out+r.err))
}

// populate puts a file and a disk with content on the volume.
func (s *site) populate() {
	s.t.Helper()
	s.okWith(noise(1, 3<<20), "fs", "put", "-", s.at("/file"))
	raw := s.file("populate", noise(2, 4<<20))
	s.ok("disk", "import", raw, s.at("/d"), "--format", "raw")
}

// intact demands what populate stored.
func (s *site) intact() {
	s.t.Helper()
	if got := s.ok("fs", "cat", s.at("/file")); got != string(noise(1, 3<<20)) {
		s.t.Error("the file holds other bytes")
	}
	if got := s.export("/d"); !bytes.Equal(got, noise(2, 4<<20)) {
		s.t.Error("the disk holds other bytes")
	}
}

func TestOneGoodSuperblockIsEnough(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "128M")
	s.populate()
	copies := s.findAll(superblockMagic, 8)
	if len(copies) != 3 {
		t.Fatalf("superblocks at %v; want three copies", copies)
	}
	good := s.bytes()
	for _, keep := range copies {
		for _, off := range copies {
			if off != keep {
				s.flip(off + 40)
			}
		}
		s.intact()
		s.damaged("superblock")
		for _, off := range copies {
			s.change(off, superblockBytes, func(b []byte) { copy(b, good[off:]) })
		}
	}
	s.checkClean()
	for _, off := range copies {
		s.flip(off + 40)
	}
	for _, args := range [][]string{{"fs", "info", s.lun}, {"fs", "check", s.lun}, {"fs", "cat", s.at("/file")}, {"disk", "info", s.at("/d")}} {
		s.fails(6, "superblock", args...)
	}
	s.fails(6, "superblock", "disk", "serve", s.lun, "--nbd", "unix:"+s.path("x"))
	s.ok("fs", "create", s.lun, "--yes")
	s.checkClean()
}

func TestNewerFormatIsLeftAlone(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "64M")
	s.populate()
	for _, off := range s.findAll(superblockMagic, 8) {
		s.change(off, superblockBytes, func(b []byte) {
			binary.LittleEndian.PutUint32(b[versionOff:], 2)
			// The checksum is seeded by a zero volume id and the copy's address.
			binary.LittleEndian.PutUint32(b, crc32.Update(unit.Seed([16]byte{}, off), unit.Castagnoli, b[4:]))
		})
	}
	before := s.sum()
	for _, args := range [][]string{
		{"fs", "info", s.lun}, {"fs", "ls", s.lun}, {"fs", "check", s.lun}, {"fs", "mkdir", s.at("/x")}, {"disk", "info", s.at("/d")},
		{"fs", "create", s.lun}, {"disk", "serve", s.lun, "--nbd", "unix:" + s.path("x")},
	} {
		r := s.run(args...)
		if r.code == 0 || args[1] != "create" && (r.code != 1 || !strings.Contains(r.err, "newer basalt")) {
			t.Errorf("basalt %q: exit code %d: %s", args, r.code, r.err)
		}
	}
	if s.sum() != before {
		t.Error("a volume of a newer format was written to")
	}
}

func TestTruncatedLUNIsDamage(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "128M")
	s.populate()
	if err := os.Truncate(s.lun, 127<<20); err != nil {
		t.Fatal(err)
	}
	before := s.sum()
	for _, args := range [][]string{
		{"fs", "info", s.lun}, {"fs", "check", s.lun}, {"fs", "mkdir", s.at("/x")}, {"disk", "serve", s.lun, "--nbd", "unix:" + s.path("x")},
	} {
		s.fails(6, "shorter than its volume", args...)
	}
	if s.sum() != before {
		t.Error("a truncated volume was written to")
	}
	if err := os.Truncate(s.lun, 128<<20); err != nil {
		t.Fatal(err)
	}
	s.intact() // what was cut off was the last superblock alone
	s.damaged("superblock")
}

// Records of another volume, in the right places, must not pass for one's own.
func TestRecordsOfAnotherVolumeAreDamage(t *testing.T) {
	t.Parallel()
	s, other := newSite(t, "--size", "128M"), newSite(t, "--size", "128M")
	s.populate()
	other.populate()
	foreign := other.bytes()
	for _, c := range []struct {
		what string
		at   []int64
		n    int
	}{
		{"superblock", s.findAll(superblockMagic, 8)[1:2], superblockBytes},
		{"header", s.findAll(headerMagic, 4)[2:], 12 << 10},
		{"", s.findAll(logMagic, 4), 4096},
	} {
		good := s.bytes()
		for _, off := range c.at {
			s.change(off, c.n, func(b []byte) { copy(b, foreign[off:]) })
		}
		if len(c.at) == 0 {
			t.Errorf("no %s found", c.what)
		}
		if c.what != "" {
			s.damaged(c.what)
		} else if r := s.run("fs", "check", s.lun); r.code != 0 && r.code != 6 {
			t.Errorf("check with a foreign log: exit code %d: %s", r.code, r.err)
		}
		if err := os.WriteFile(s.lun, good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.checkClean()
	s.intact()
}

// A place that turns bad makes at worst its own object fail, never the program, and
// never silently: what is read back is right, or is an error, or check tells. (A
// header that does not read gives way to the one before it, as after a torn write.)
func TestFlippedBitsAreNeverSilent(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "64M")
	s.populate()
	s.ok("disk", "snapshot", "create", s.at("/d"), "s")
	good := s.bytes()
	found := 0
	// Every unit of 4 KiB from the first superblock to the end of the table's first
	// objects, and the disk's own metadata.
	var at []int64
	for off := int64(1 << 20); off < 4<<20; off += 512 << 10 {
		at = append(at, off)
	}
	for off := int64(16 << 20); off < 17<<20; off += 4096 {
		if !isZero(good[off : off+4096]) {
			at = append(at, off)
		}
	}
	for slot := range int64(6) {
		for _, in := range []int64{0, 4 << 10, 8 << 10, 20 << 10} {
			at = append(at, 17<<20+slot*32<<10+in)
		}
	}
	at = append(at, s.findAll(logMagic, 4)...)
	for _, off := range at {
		s.flip(off + 30)
		r := s.run("fs", "check", s.lun)
		if r.code != 0 && r.code != 6 {
			t.Errorf("byte %#x flipped: check ends with exit code %d: %s", off+30, r.code, r.err)
		}
		if r.code == 6 {
			found++
		}
		if cat := s.run("fs", "cat", s.at("/file")); cat.code == 0 && r.code == 0 && !strings.Contains(r.out, "header") && cat.out != string(noise(1, 3<<20)) {
			t.Errorf("byte %#x flipped: the file reads as other bytes and check finds nothing", off+30)
		}
		if info := s.run("disk", "info", s.at("/d")); strings.Contains(info.err, "panic") {
			t.Errorf("byte %#x flipped: %s", off+30, info.err)
		}
		s.change(off, 4096, func(b []byte) { copy(b, good[off:]) })
	}
	if found < len(at)/3 {
		t.Errorf("check noticed %d of %d", found, len(at))
	}
	t.Logf("%d places damaged in turn, check called %d of them damage", len(at), found)
}

func isZero(b []byte) bool { return len(bytes.TrimLeft(b, "\x00")) == 0 }

// lastRecord is the newest record of the only disk's log.
func (s *site) lastRecord() int64 {
	s.t.Helper()
	b := s.bytes()
	var at int64
	var newest uint64
	for _, off := range s.findAll(logMagic, 4) {
		if seq := binary.LittleEndian.Uint64(b[off+24:]); seq >= newest {
			newest, at = seq, off
		}
	}
	if at == 0 {
		s.t.Fatal("no log record on the LUN")
	}
	return at
}

// A record that the power cut tore was never acknowledged: the disk opens as it
// was before it.
func TestTornLogTailIsCutOff(t *testing.T) {
	t.Parallel()
	for name, tear := range map[string]func(b []byte){
		"checksum": func(b []byte) { b[0] ^= 1 },
		"half":     func(b []byte) { clear(b[512:]); b[100] ^= 0xff },
		"zeros":    func(b []byte) { clear(b) },
		"garbage":  func(b []byte) { copy(b, noise(9, len(b))) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, "--size", "128M", "--lease", "60s")
			s.ok("disk", "create", s.at("/d"), "--size", "16M")
			v := s.serve()
			q := openDisk(t, v.socket, "d", 0)
			q.do("write -P 1 0 1M")
			q.do("flush")
			q.do("write -P 2 1M 1M")
			q.do("flush")
			before := s.lastRecord()
			q.do("write -P 3 2M 64k")
			q.do("flush")
			v.kill()
			last := s.lastRecord()
			if last == before {
				t.Fatal("the last write left no record of its own")
			}
			s.change(last, 4096, tear)
			v = s.serve()
			q = openDisk(t, v.socket, "d", 0)
			q.do("read -P 1 0 1M")
			q.do("read -P 2 1M 1M")
			q.do("read -P 0 2M 64k")
			q.do("write -P 4 2M 64k")
			q.close()
			v.stop()
			s.checkClean()
			v = s.serve()
			q = openDisk(t, v.socket, "d", 0)
			q.do("read -P 4 2M 64k")
			q.close()
			v.stop()
		})
	}
}

func TestMountedVolumeIsNotFormatted(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "64M", "--lease", "60s")
	v := s.serve()
	s.as("b").fails(4, `"a"`, "fs", "create", s.lun, "--yes")
	s.fails(4, `"a"`, "fs", "create", s.lun, "--yes")
	s.ok("fs", "mkdir", s.at("/still-there"))
	v.kill()
	d := took(func() { s.as("b").ok("fs", "create", s.lun, "--yes") })
	if d > 20*time.Second {
		t.Errorf("formatting over a dead host's mount took %v", d)
	}
	s.checkClean()
}
