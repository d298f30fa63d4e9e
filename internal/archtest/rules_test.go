package archtest_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"basalt/internal/archtest"
)

// small is a house with one of everything.
func small() *archtest.Rules {
	return &archtest.Rules{
		Floors: []archtest.Floor{
			{Name: "low", Packages: []string{"seam", "seam/part", "tick"}, TestOnly: []string{"seam/fake"}},
			{Name: "mid", Packages: []string{"disk", "disk/map", "raftish"}},
			{Name: "top", Packages: []string{"whole"}},
		},
		Side:    []string{"e2e"},
		Bridges: []archtest.Bridge{{From: "seam/part", To: "seam", Reason: "a part of it"}},
		Bans: []archtest.Ban{
			{From: []string{"disk"}, To: []string{"raftish", "example.org/raft"}, Reason: "disks work when raft is down"},
			{From: []string{"seam"}, To: []string{"os"}, Reason: "the seam does no I/O"},
			{From: []string{"*"}, To: []string{"testing"}, Reason: "not in the binary"},
		},
		ReadsTime: []string{"tick", "e2e"},
		MaxLines:  9,
		BadNames:  []string{"util"},
	}
}

// file is the source of a Go file whose package is documented when doc is true.
func file(doc bool, pkg string, imports ...string) string {
	var b strings.Builder
	if doc {
		fmt.Fprintf(&b, "// Package %s is a sample.\n", pkg)
	}
	fmt.Fprintf(&b, "package %s\n", pkg)
	for _, i := range imports {
		fmt.Fprintf(&b, "import _ %q\n", i)
	}
	return b.String()
}

func tree(t *testing.T, files map[string]string) *archtest.Tree {
	t.Helper()
	fsys := fstest.MapFS{"go.mod": {Data: []byte("module m\n\ngo 1.26.0\n")}}
	for name, src := range files {
		fsys[name] = &fstest.MapFile{Data: []byte(src)}
	}
	got, err := archtest.Load(fsys)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// compare checks that the violations are those of want, each by a part of its
// text, in any order.
func compare(t *testing.T, got []archtest.Violation, want []string) {
	t.Helper()
	var texts []string
	for _, v := range got {
		texts = append(texts, v.String())
	}
	left := slices.Clone(texts)
	for _, w := range want {
		i := slices.IndexFunc(left, func(s string) bool { return strings.Contains(s, w) })
		if i < 0 {
			t.Errorf("no violation has %q", w)
			continue
		}
		left = slices.Delete(left, i, i+1)
	}
	if len(left) > 0 {
		t.Errorf("not expected: %q", left)
	}
	if t.Failed() {
		t.Logf("all: %q", texts)
	}
}

func TestLayeringFindsEachForbiddenEdge(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]string
		want  []string
	}{
		"lower floor, own child, bridge": {files: map[string]string{
			"disk/d.go":      file(true, "disk", "m/seam", "m/disk/map", "fmt"),
			"seam/part/p.go": file(true, "part", "m/seam"),
			"whole/w.go":     file(true, "whole", "m/disk", "m/raftish", "m/disk/map"),
		}},
		"higher floor": {
			files: map[string]string{"disk/d.go": file(true, "disk", "m/whole")},
			want:  []string{"disk/d.go:3: disk (floor 1, mid) imports whole (floor 2, top): a package never imports a higher floor"},
		},
		"sibling, with the reason of its ban": {
			files: map[string]string{"disk/d.go": file(true, "disk", "m/raftish")},
			want: []string{
				"imports raftish (floor 1, mid): a package never imports its own floor; declare an interface here and let a higher floor wire it (disks work when raft is down)",
				"disk: disk -> raftish: disks work when raft is down",
			},
		},
		"child imports parent": {
			files: map[string]string{"disk/map/m.go": file(true, "dmap", "m/disk")},
			want:  []string{"disk/map (floor 1, mid) imports disk"},
		},
		"banned through a child": {
			files: map[string]string{
				"disk/d.go":     file(true, "disk", "m/disk/map"),
				"disk/map/m.go": file(true, "dmap", "example.org/raft/log"),
			},
			want: []string{"disk: disk -> disk/map -> example.org/raft/log: disks work when raft is down"},
		},
		"a name that only begins like the banned one": {
			files: map[string]string{"disk/d.go": file(true, "disk", "example.org/raftwal")},
		},
		"codec that does I/O, in one platform's file": {
			files: map[string]string{"seam/s_plan9.go": file(true, "seam", "os")},
			want:  []string{"seam: seam -> os: the seam does no I/O"},
		},
		"test support in the binary": {
			files: map[string]string{"tick/t.go": file(true, "tick", "testing")},
			want:  []string{"tick: tick -> testing: not in the binary"},
		},
		"test-only package outside tests": {
			files: map[string]string{"disk/d.go": file(true, "disk", "m/seam/fake")},
			want:  []string{"disk (floor 1, mid) imports seam/fake (floor 0, low): only tests may use it"},
		},
		"tests use fakes and peers, not higher floors": {
			files: map[string]string{
				"seam/part/p_test.go": file(true, "part_test", "m/seam/fake", "m/tick", "os", "testing"),
				"disk/d_test.go":      file(true, "disk_test", "m/whole", "testing"),
			},
			want: []string{"disk/d_test.go:3: disk (floor 1, mid) imports whole"},
		},
		"side packages are reached by e2e tests only": {
			files: map[string]string{
				"e2e/guest/g.go":    file(true, "guest", "m/whole", "m/seam/fake", "testing"),
				"disk/boot_test.go": "//go:build e2e && linux\n\n" + file(true, "disk_test", "m/e2e/guest"),
				"disk/d_test.go":    file(true, "disk_test", "m/e2e/guest"),
				"whole/w.go":        "//go:build e2e\n\n" + file(true, "whole", "m/e2e/guest"),
			},
			want: []string{
				"disk/d_test.go:3: disk (floor 1, mid) imports e2e/guest (floor 3, side)",
				"whole/w.go:5: whole (floor 2, top) imports e2e/guest (floor 3, side)",
				"whole: whole -> e2e/guest -> testing",
			},
		},
		"unknown package": {
			files: map[string]string{
				"disk/d.go":          file(true, "disk", "m/disk/extra"),
				"disk/extra/e.go":    file(true, "extra"),
				"disk/testdata/x.go": "not Go",
				"_old/x.go":          "not Go",
				".cache/x.go":        "not Go",
				"other/go.mod":       "module other\n",
				"other/x.go":         file(true, "other"),
			},
			want: []string{"disk/extra: package is on no floor: add it to House in internal/archtest/house.go"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			compare(t, small().Layering(tree(t, c.files)), c.want)
		})
	}
}

func TestHabitsFindsEachOffence(t *testing.T) {
	long := file(true, "disk") + strings.Repeat("\n", 8)
	clocks := func(pkg string) string {
		return file(false, pkg) + "import stamp \"time\"\nvar a, b, c = stamp.Now, stamp.Since, stamp.Sleep\n"
	}
	for name, c := range map[string]struct {
		files map[string]string
		want  []string
	}{
		"no package comment": {
			files: map[string]string{"disk/d.go": "//go:build linux\n\n" + file(false, "disk")},
			want:  []string{"disk: no package comment"},
		},
		"two package comments": {
			files: map[string]string{"disk/d.go": file(true, "disk"), "disk/e_test.go": file(true, "disk_test")},
			want:  []string{"disk: several package comments: keep one of disk/d.go, disk/e_test.go"},
		},
		"long file": {
			files: map[string]string{"disk/d.go": long},
			want:  []string{"disk/d.go: 10 lines, more than 9"},
		},
		"long file from a generator": {
			files: map[string]string{"disk/d.go": "// Code generated by x; DO NOT EDIT.\n\n" + long},
		},
		"name of a folder, name of a package": {
			files: map[string]string{"disk/util/u.go": file(true, "sum"), "seam/x_test.go": file(true, "util_test")},
			want:  []string{`disk/util: the name "util" says nothing`, `seam: the name "util" says nothing`},
		},
		"clock read and sleep under another name": {
			files: map[string]string{"disk/d.go": file(true, "disk"), "disk/t.go": clocks("disk")},
			want:  []string{"disk/t.go:3: time.Now", "disk/t.go:3: time.Since", "disk/t.go:3: time.Sleep: wait on a timer"},
		},
		"clock where it is allowed, but no sleep in tests": {
			files: map[string]string{
				"tick/d.go":             file(true, "tick"),
				"tick/t.go":             clocks("tick"),
				"e2e/demo/main.go":      file(true, "main"),
				"e2e/demo/d_test.go":    clocks("main"),
				"disk/d.go":             file(true, "disk"),
				"disk/boot_test.go":     "//go:build e2e\n\n" + clocks("disk_test"),
				"disk/duration_test.go": file(false, "disk_test") + "import \"time\"\nvar d = time.Second\n",
			},
			want: []string{"e2e/demo/d_test.go:3: time.Sleep: wait for the event", "disk/boot_test.go:5: time.Sleep: wait for the event"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			compare(t, small().Habits(tree(t, c.files)), c.want)
		})
	}
}

func TestLoadRefusesWhatItCannotRead(t *testing.T) {
	for name, fsys := range map[string]fstest.MapFS{
		"no go.mod":      {"a/a.go": {Data: []byte("package a\n")}},
		"no module line": {"go.mod": {Data: []byte("go 1.26.0\n")}},
		"broken file":    {"go.mod": {Data: []byte("module m\n")}, "a/a.go": {Data: []byte("package a; func {")}},
	} {
		if _, err := archtest.Load(fsys); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestHouseNamesEachPackageOnce(t *testing.T) {
	seen := make(map[string]string)
	r := archtest.House()
	for _, f := range r.Floors {
		for _, p := range slices.Concat(f.Packages, f.TestOnly) {
			if at, twice := seen[p]; twice {
				t.Errorf("%s stands on two floors, %s and %s", p, at, f.Name)
			}
			seen[p] = f.Name
		}
	}
	for _, b := range r.Bans {
		for _, from := range b.From {
			if seen[from] == "" && from != "*" {
				t.Errorf("the ban %q binds %s, which stands on no floor", b.Reason, from)
			}
		}
	}
}
