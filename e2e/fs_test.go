//go:build e2e

package e2e_test

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// items is how listings look in JSON.
type items[T any] struct {
	Items []T `json:"items"`
}

// entry is an item of "fs ls" and the answer of "fs stat".
type entry struct {
	Name      string    `json:"name"`
	Kind      string    `json:"kind"`
	SizeBytes int64     `json:"size_bytes"`
	Modified  time.Time `json:"modified"`
	Object    string    `json:"object"`
	LockedBy  string    `json:"locked_by"`
}

// volume is the answer of "fs info" and "fs df".
type volume struct {
	Volume       string    `json:"volume"`
	Label        string    `json:"label"`
	Created      time.Time `json:"created"`
	SizeBytes    int64     `json:"size_bytes"`
	UsedBytes    int64     `json:"used_bytes"`
	FreeBytes    int64     `json:"free_bytes"`
	SystemBytes  int64     `json:"system_bytes"`
	ReserveBytes int64     `json:"reserve_bytes"`
	UnitBytes    int       `json:"unit_bytes"`
	LeaseMillis  int64     `json:"lease_ms"`
	Format       int       `json:"format_version"`
}

// hostView is an item of "fs hosts".
type hostView struct {
	Name       string    `json:"name"`
	Slot       int       `json:"slot"`
	Generation uint32    `json:"generation"`
	State      string    `json:"state"`
	Server     bool      `json:"server"`
	Fencing    string    `json:"fencing"`
	Locks      int       `json:"locks"`
	Since      time.Time `json:"since"`
	PID        int       `json:"pid"`
}

// checked is the answer of "fs check".
type checked struct {
	Findings []struct {
		Severity string `json:"severity"`
		Where    string `json:"where"`
		What     string `json:"what"`
	} `json:"findings"`
	Objects   int   `json:"objects"`
	Skipped   int   `json:"skipped"`
	UsedBytes int64 `json:"used_bytes"`
	FreeBytes int64 `json:"free_bytes"`
	Clean     bool  `json:"clean"`
}

// noise gives n bytes that do not compress and follow from the seed.
func noise(seed uint64, n int) []byte {
	b := make([]byte, n)
	var key [32]byte
	key[0], key[1], key[2], key[3] = byte(seed), byte(seed>>8), byte(seed>>16), byte(seed>>24)
	if _, err := rand.NewChaCha8(key).Read(b); err != nil {
		panic(err) // it never fails
	}
	return b
}

// file writes content to a file of the machine.
func (s *site) file(name string, content []byte) string {
	s.t.Helper()
	path := s.path(name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

func (s *site) names(path string) string {
	s.t.Helper()
	var names []string
	for _, e := range decode[items[entry]](s, "fs", "ls", s.at(path)).Items {
		names = append(names, e.Name)
	}
	return strings.Join(names, " ")
}

func TestVolumeTellsWhatItIs(t *testing.T) {
	t.Parallel()
	s := emptySite(t)
	out := s.ok("fs", "create", s.lun, "--size", "1G", "--label", "fast storage", "--lease", "5s")
	v := decode[volume](s, "fs", "info", s.lun)
	if !strings.Contains(out, v.Volume) || len(v.Volume) != 32 {
		t.Errorf("create says %q, info %q", out, v.Volume)
	}
	if v.Label != "fast storage" || v.SizeBytes != 1<<30 || v.LeaseMillis != 5000 || v.Format != 1 || v.UsedBytes != 0 {
		t.Errorf("got %+v", v)
	}
	if sum := v.UsedBytes + v.FreeBytes + v.SystemBytes; sum != v.SizeBytes {
		t.Errorf("used, free and system add up to %d, not %d", sum, v.SizeBytes)
	}
	fi, err := os.Stat(s.lun)
	if err != nil || fi.Size() != 1<<30 {
		t.Fatalf("the LUN: %v, %v", fi, err)
	}
	if alloc := allocated(t, s.lun); alloc > 64<<20 {
		t.Errorf("an empty volume of 1 GiB takes %d bytes", alloc)
	}
	s.okWith(noise(1, 3<<20), "fs", "put", "-", s.at("/three"))
	df := decode[volume](s, "fs", "df", s.lun)
	if df.UsedBytes != 3<<20 || df.FreeBytes != v.FreeBytes-3<<20 {
		t.Errorf("3 MiB stored: used %d, free %d of %d", df.UsedBytes, df.FreeBytes, v.FreeBytes)
	}
	for _, verb := range []string{"info", "df"} {
		if out := s.ok("fs", verb, s.lun); !strings.Contains(out, "GiB") {
			t.Errorf("fs %s for people: %q", verb, out)
		}
	}
	s.checkClean()
}

func TestCreateAsksBeforeItDestroys(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "64M")
	s.okWith([]byte("precious"), "fs", "put", "-", s.at("/f"))
	s.fails(2, "--yes", "fs", "create", s.lun)
	s.fails(2, "--size is for a new file", "fs", "create", s.lun, "--size", "1G", "--yes")
	if got := s.ok("fs", "cat", s.at("/f")); got != "precious" {
		t.Errorf("a refused create left %q", got)
	}
	before := decode[volume](s, "fs", "info", s.lun).Volume
	s.ok("fs", "create", s.lun, "--yes")
	if now := decode[volume](s, "fs", "info", s.lun).Volume; now == before {
		t.Error("the new volume has the old one's id")
	}
	if got := s.names("/"); got != "" {
		t.Errorf("the new volume holds %q", got)
	}
}

func TestFilesReadBackByteForByte(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "256M")
	s.ok("fs", "mkdir", s.at("/dir"))
	sizes := []int{0, 1, 511, 512, 4096, 11767, 11768, 11769, 12 << 10, 1<<20 - 1, 1 << 20, 1<<20 + 1, 17<<20 + 5}
	for i, n := range sizes {
		want := noise(uint64(i), n)
		src := s.file("src", want)
		at := s.at("/dir/" + string(rune('a'+i)))
		s.ok("fs", "put", src, at)
		if got := s.ok("fs", "cat", at); got != string(want) {
			t.Fatalf("cat of %d bytes gives %d others", n, len(got))
		}
		dst := s.path("dst")
		s.ok("fs", "get", at, dst, "--yes")
		if got, err := os.ReadFile(dst); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("get of %d bytes gives %d others (%v)", n, len(got), err)
		}
		if e := decode[entry](s, "fs", "stat", at); e.SizeBytes != int64(n) || e.Kind != "file" || e.Name != string(rune('a'+i)) || e.LockedBy != "" {
			t.Errorf("stat of %d bytes: %+v", n, e)
		}
	}
	list := decode[items[entry]](s, "fs", "ls", s.at("/dir")).Items
	if len(list) != len(sizes) {
		t.Errorf("%d files listed, %d stored", len(list), len(sizes))
	}
	for i, e := range list {
		if e.SizeBytes != int64(sizes[i]) {
			t.Errorf("ls shows %+v, want %d bytes", e, sizes[i])
		}
	}
	s.checkClean()
	t.Logf("%d files of 0 to %d bytes read back", len(sizes), sizes[len(sizes)-1])
}

func TestPutAndGetRefuseToOverwrite(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "64M")
	s.okWith([]byte("first"), "fs", "put", "-", s.at("/f"))
	src := s.file("second", []byte("second"))
	s.fails(1, "exists", "fs", "put", src, s.at("/f"))
	s.fails(2, "--yes", "fs", "get", s.at("/f"), src)
	if got, err := os.ReadFile(src); err != nil || string(got) != "second" {
		t.Errorf("a refused get left %q (%v)", got, err)
	}
	if got := s.ok("fs", "get", s.at("/f"), "-"); got != "first" {
		t.Errorf("a refused put left %q", got)
	}
	fresh := s.path("fresh")
	s.fails(3, "not found", "fs", "get", s.at("/missing"), fresh)
	if _, err := os.Stat(fresh); !os.IsNotExist(err) {
		t.Errorf("a failed get leaves a file behind (%v)", err)
	}
}

func TestFoldersNestMoveAndGo(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "64M")
	for _, d := range []string{"/a", "/a/b", "/a/b/c", "/z"} {
		s.ok("fs", "mkdir", s.at(d))
	}
	s.okWith([]byte("deep"), "fs", "put", "-", s.at("/a/b/c/f"))
	s.ok("fs", "mv", s.at("/a/b"), s.at("/z/moved"))
	if got := s.ok("fs", "cat", s.at("/z/moved/c/f")); got != "deep" {
		t.Errorf("after the move: %q", got)
	}
	s.fails(3, "not found", "fs", "cat", s.at("/a/b/c/f"))
	s.ok("fs", "mv", s.at("/z/moved/c/f"), s.at("/z/moved/c/g"))
	s.fails(2, "into itself", "fs", "mv", s.at("/z"), s.at("/z/moved/c/z"))
	s.okWith(nil, "fs", "put", "-", s.at("/other"))
	s.fails(1, "exists", "fs", "mv", s.at("/other"), s.at("/a"))
	s.fails(1, "exists", "fs", "mkdir", s.at("/a"))
	s.fails(3, "not found", "fs", "mkdir", s.at("/no/such"))
	s.fails(1, "not a folder", "fs", "mkdir", s.at("/other/x"))
	s.fails(1, "folder", "fs", "cat", s.at("/a"))
	s.fails(1, "-r", "fs", "rm", s.at("/z"), "--yes")
	s.fails(2, "--yes", "fs", "rm", s.at("/z"), "-r")
	s.ok("fs", "rm", s.at("/z"), s.at("/other"), "-r", "--yes")
	s.ok("fs", "rm", s.at("/a"), "--yes")
	if got := s.names("/"); got != "" {
		t.Errorf("left over: %q", got)
	}
	if v := decode[volume](s, "fs", "df", s.lun); v.UsedBytes != 0 {
		t.Errorf("an empty volume has %d bytes in use", v.UsedBytes)
	}
	s.fails(2, "root", "fs", "rm", s.at("/"), "-r", "--yes")
	s.checkClean()
}

func TestListingsAreJSONWithItems(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "64M")
	for _, args := range [][]string{{"fs", "ls", s.lun}, {"fs", "hosts", s.lun}, {"disk", "ls", s.lun}} {
		var v map[string][]json.RawMessage
		if err := json.Unmarshal([]byte(s.ok(append(args, "--json")...)), &v); err != nil || v["items"] == nil || len(v) != 1 {
			t.Errorf("basalt %q on an empty volume: %v, %v", args, v, err)
		}
	}
	c := decode[checked](s, "fs", "check", s.lun)
	if !c.Clean || c.Findings == nil || c.Skipped != 0 || c.FreeBytes == 0 {
		t.Errorf("check of an empty volume: %+v", c)
	}
}

func TestHostileNamesAreRefused(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "64M")
	long := strings.Repeat("n", 255)
	good := []string{"plain", "with space", "-dash", "--yes", "päth", "日本語", "a'b\"c", "$(reboot)", "*?[", "back\\slash", ".hidden", "...", long, "%2f", "a,b=c", "file", "#"}
	for _, name := range good {
		s.okWith([]byte(name), "fs", "put", "-", s.at("/"+name))
		if got := s.ok("fs", "cat", s.at("/"+name)); got != name {
			t.Errorf("%q reads back as %q", name, got)
		}
	}
	if n := len(decode[items[entry]](s, "fs", "ls", s.lun).Items); n != len(good) {
		t.Errorf("%d of %d names are listed", n, len(good))
	}
	for _, name := range []string{"a:b", "a@b", ".", "..", "x/../y", "a\nb", "a\x01b", "a\x7fb", "\xff\xfe", long + "n", "a\u0085b"} {
		s.fails(2, "", "fs", "put", s.file("src", nil), s.at("/"+name))
		s.fails(2, "", "fs", "mkdir", s.at("/"+name))
	}
	for _, addr := range []string{"", ":/x", s.lun + ":/a@", s.lun + ":/a@b@c", s.lun + ":/a@b/c"} {
		s.fails(2, "", "disk", "info", addr)
	}
	for _, host := range []string{"", "..", "a/b", "a:b", "a@b", "a\nb", strings.Repeat("h", 256)} {
		s.as(host).fails(2, "host name", "fs", "mkdir", s.at("/d"))
	}
	s.checkClean()
}

func TestWrongUsageIsExitCode2(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "64M")
	for _, c := range []struct {
		says string
		args []string
	}{
		{"verb", nil},
		{"verb", []string{"nonsense"}},
		{"verb", []string{"fs"}},
		{"verb", []string{"fs", "nonsense"}},
		{"verb", []string{"disk", "snapshot"}},
		{"flag", []string{"fs", "info", s.lun, "--nonsense"}},
		{"arguments", []string{"fs", "info"}},
		{"arguments", []string{"fs", "info", s.lun, s.lun}},
		{"arguments", []string{"fs", "mv", s.at("/a")}},
		{"object", []string{"fs", "info", s.at("/a")}},
		{"LUN", []string{"fs", "mkdir", s.lun}},
		{"LUNs", []string{"fs", "mv", s.at("/a"), s.path("other") + ":/a"}},
		{"snapshot", []string{"fs", "cat", s.at("/a@snap")}},
		{"size", []string{"fs", "create", s.path("new"), "--size", "big"}},
		{"size", []string{"fs", "create", s.path("new"), "--size", "-1G"}},
		{"size", []string{"fs", "create", s.path("new"), "--size", "99999999T"}},
		{"64 MiB", []string{"fs", "create", s.path("new"), "--size", "63M"}},
		{"lease", []string{"fs", "create", s.path("new"), "--size", "64M", "--lease", "1ms"}},
		{"not built yet", []string{"fs", "info", "iscsi://host/iqn/1"}},
		{"--size", []string{"disk", "create", s.at("/d")}},
		{"512", []string{"disk", "create", s.at("/d"), "--size", "1000"}},
		{"62", []string{"disk", "create", s.at("/d"), "--size", "63T"}},
		{"policy", []string{"disk", "create", s.at("/d"), "--size", "1M", "--policy", "fat"}},
		{"--nbd", []string{"disk", "serve", s.lun}},
		{"listen", []string{"disk", "serve", s.lun, "--nbd", "carrier-pigeon:coop"}},
		{"format", []string{"disk", "import", s.lun, s.at("/d"), "--format", "docx"}},
		{"format", []string{"disk", "export", s.at("/d"), s.path("x"), "--format", "docx"}},
		{"snapshot", []string{"disk", "clone", s.at("/d"), s.at("/e")}},
	} {
		s.fails(2, c.says, c.args...)
	}
	if _, err := os.Stat(s.path("new")); !os.IsNotExist(err) {
		t.Errorf("a refused create left a file (%v)", err)
	}
	s.fails(3, "no such file", "fs", "info", s.path("missing"))
	s.fails(3, "--size", "fs", "create", s.path("missing"))
	s.fails(3, "basalt fs create", "fs", "info", s.file("empty", make([]byte, 64<<20)))
	s.fails(3, "no such file", "fs", "put", s.path("missing"), s.at("/f"))
}

func TestHelpIsThere(t *testing.T) {
	t.Parallel()
	s := emptySite(t)
	for _, args := range [][]string{{"--help"}, {"fs", "--help"}, {"disk", "serve", "--help"}} {
		if out := s.ok(args...); !strings.Contains(out, "Usage:") {
			t.Errorf("basalt %q: %q", args, out)
		}
	}
	if out, err := filepath.Glob(s.path("*")); err != nil || len(out) > 0 {
		t.Errorf("help made %v (%v)", out, err)
	}
}
