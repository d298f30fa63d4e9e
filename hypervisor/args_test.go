package hypervisor

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// hostile is a value that would end an option or start another one if it were
// pasted into one.
const hostile = `a,b="c" d=e,,file.filename=/etc/shadow`

func goldenSpecs() map[string]struct {
	spec  Spec
	accel Accel
} {
	type c = struct {
		spec  Spec
		accel Accel
	}
	return map[string]c{
		"tcg-kernel": {Spec{
			Name: "web 1", MemoryMiB: 512, VCPUs: 2, UID: 7, GID: 7, RunDir: "/run/basalt/vm/web", NoReboot: true, Console: ConsoleFile,
			Boot:  Boot{Kernel: "/boot/k", Initrd: "/boot/i", Append: "console=ttyS0 x=1,2"},
			Disks: []Disk{{Socket: "/run/basalt/web/nbd", Export: "vm1/d0", Serial: "d0"}, {Socket: "/run/basalt/web/nbd", Export: "vm1/d1@snap", ReadOnly: true}},
		}, Accel{Kind: TCG}},
		"kvm-firmware": {Spec{
			Name: "db", MemoryMiB: 4096, VCPUs: 16, CPU: "EPYC-Rome", UID: 7, GID: 7, RunDir: "/run/db",
			Boot:  Boot{BIOS: "/usr/share/ovmf/OVMF.fd"},
			Disks: []Disk{{Socket: "/run/db-nbd/s", Export: "db"}},
		}, Accel{Kind: KVM}},
		"hostile-names": {Spec{
			Name: `"x" y`, MemoryMiB: 64, VCPUs: 1, UID: 7, GID: 7, RunDir: "/run/" + strings.ReplaceAll(hostile, "/", "_"),
			Boot:  Boot{Kernel: "/boot/" + strings.ReplaceAll(hostile, "/", "_"), Append: hostile},
			Disks: []Disk{{Socket: "/run/" + strings.ReplaceAll(hostile, "/", "_") + "/s", Export: hostile}},
		}, Accel{Kind: TCG}},
	}
}

func TestArgumentsMatchGoldenText(t *testing.T) {
	for name, c := range goldenSpecs() {
		t.Run(name, func(t *testing.T) {
			if err := c.spec.Validate(); err != nil {
				t.Fatal(err)
			}
			got := strings.Join(arguments(c.spec, c.accel), "\n") + "\n"
			path := filepath.Join("testdata", "args-"+name+".txt")
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("%s differs; got:\n%s", path, got)
			}
		})
	}
}

func TestHostileNamesStayWholeValues(t *testing.T) {
	c := goldenSpecs()["hostile-names"]
	args := arguments(c.spec, c.accel)
	i := slices.Index(args, "-blockdev")
	var dev blockdevArg
	if err := json.Unmarshal([]byte(args[i+1]), &dev); err != nil {
		t.Fatal(err)
	}
	if dev.Export != hostile || dev.Server.Path != c.spec.Disks[0].Socket || dev.Driver != "nbd" {
		t.Errorf("the names changed on their way: %+v", dev)
	}
	if i := slices.Index(args, "-append"); args[i+1] != hostile {
		t.Errorf("command line is %q", args[i+1])
	}
}

func TestValidateRefuses(t *testing.T) {
	good := goldenSpecs()["tcg-kernel"].spec
	for name, breakIt := range map[string]func(*Spec){
		"no name":                func(s *Spec) { s.Name = "" },
		"option in name":         func(s *Spec) { s.Name = "a,debug-threads=off" },
		"newline in name":        func(s *Spec) { s.Name = "a\nb" },
		"long name":              func(s *Spec) { s.Name = strings.Repeat("x", 256) },
		"no memory":              func(s *Spec) { s.MemoryMiB = 0 },
		"no vCPU":                func(s *Spec) { s.VCPUs = 0 },
		"option in CPU":          func(s *Spec) { s.CPU = "host,+vmx" },
		"root":                   func(s *Spec) { s.UID = 0 },
		"root's group":           func(s *Spec) { s.GID = 0 },
		"relative run folder":    func(s *Spec) { s.RunDir = "run" },
		"unclean run folder":     func(s *Spec) { s.RunDir = "/run/../etc" },
		"long run folder":        func(s *Spec) { s.RunDir = "/" + strings.Repeat("x", 100) },
		"kernel with newline":    func(s *Spec) { s.Boot.Kernel = "/k\n" },
		"initrd alone":           func(s *Spec) { s.Boot = Boot{Initrd: "/i"} },
		"command line alone":     func(s *Spec) { s.Boot = Boot{Append: "x"} },
		"NUL in command line":    func(s *Spec) { s.Boot.Append = "a\x00b" },
		"relative socket":        func(s *Spec) { s.Disks[0].Socket = "nbd" },
		"socket in the root":     func(s *Spec) { s.Disks[0].Socket = "/nbd" },
		"long socket path":       func(s *Spec) { s.Disks[0].Socket = "/x/" + strings.Repeat("x", 105) },
		"bad export":             func(s *Spec) { s.Disks[0].Export = "\xff" },
		"quote in serial":        func(s *Spec) { s.Disks[0].Serial = `a"b` },
		"long serial":            func(s *Spec) { s.Disks[0].Serial = strings.Repeat("1", 21) },
		"too many disks":         func(s *Spec) { s.Disks = make([]Disk, MaxDisks+1) },
		"no such kind of output": func(s *Spec) { s.Console = 9 },
	} {
		s := good
		s.Disks = slices.Clone(good.Disks)
		breakIt(&s)
		if err := s.Validate(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if err := good.Validate(); err != nil {
		t.Errorf("the spec they start from: %v", err)
	}
}

func TestRootShowsOnlyWhatTheSpecNames(t *testing.T) {
	c := goldenSpecs()["tcg-kernel"]
	p := planRoot("/run/r", c.spec, c.accel, Options{ReadOnlyPaths: []string{"/opt/qemu"}})
	want := slices.Concat(systemPaths, []string{"/opt/qemu", "/boot/k", "/boot/i", "/run/basalt/web"})
	slices.Sort(want)
	if !slices.Equal(p.visible, want) {
		t.Errorf("visible: %v; want %v", p.visible, want)
	}
	for _, d := range p.devices {
		if d.name == "kvm" {
			t.Error("a translated guest needs no /dev/kvm")
		}
	}
}
