package hypervisor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

// ErrSpec: the specification can never run. The error says why.
var ErrSpec = errors.New("hypervisor: bad specification")

// Limits of a Spec.
const (
	MinMemoryMiB = 16
	MaxMemoryMiB = 4 << 20 // 4 TiB
	MaxVCPUs     = 255     // xAPIC; more need an IOMMU and x2APIC
	MaxDisks     = 24      // slots of the PCIe root complex less the machine's own
	maxNameBytes = 255
	maxSerial    = 20 // bytes, virtio-blk
	// maxSocketPath is sockaddr_un's sun_path without its NUL.
	maxSocketPath = 107
)

// Spec is a virtual machine as plain data.
type Spec struct {
	// Name is 1..255 bytes of UTF-8 without '@', ':', '/', ',', '=' or control
	// characters.
	Name      string
	MemoryMiB int // MinMemoryMiB..MaxMemoryMiB
	VCPUs     int // 1..MaxVCPUs
	// CPU is a QEMU CPU model without options, such as "EPYC"; default "host" with
	// KVM, "max" with TCG.
	CPU     string
	Boot    Boot
	Disks   []Disk
	Console Console
	// NoReboot ends QEMU when the guest resets, instead of booting it again.
	NoReboot bool
	// RunDir is an absolute path, private to this VM and its starter; Start makes
	// it. It must be empty of other things and, with the names in it, fit a unix
	// socket address.
	RunDir string
	// UID and GID are the VM's own, never 0. A starter that is not root can only
	// give its own.
	UID, GID uint32
}

// Boot is where the guest's first code comes from. The zero value is SeaBIOS and
// the first disk.
type Boot struct {
	Kernel string // path of a Linux kernel; empty: boot from the first disk
	Initrd string // path; only with Kernel
	Append string // kernel command line; only with Kernel
	BIOS   string // path of a firmware image; empty: SeaBIOS
}

// Disk is a virtio block device whose content is an NBD export.
type Disk struct {
	// Socket is the absolute path of the NBD server's unix socket. Its folder must
	// hold nothing that this VM may not reach, for the whole folder is visible to
	// it (a server that restarts makes a new socket there); the folder must be
	// searchable and the socket writable by the VM's uid or gid. Start changes no
	// permission.
	Socket   string
	Export   string // 0..255 bytes of printable UTF-8
	ReadOnly bool
	Serial   string // 0..20 bytes of A-Z, a-z, 0-9, '_', '-', '.'; what the guest sees
}

// Console is where the guest's first serial port ends.
type Console int

// Kinds of Console.
const (
	// ConsoleSocket: the unix socket console.sock in the run folder, one client at
	// a time. Output without a client is lost.
	ConsoleSocket Console = iota
	// ConsoleFile: the file console.log in the run folder, appended to without a
	// bound: for short-lived guests.
	ConsoleFile
)

var (
	wordPattern   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)
	serialPattern = regexp.MustCompile(`^[A-Za-z0-9._-]{0,20}$`)
)

// Validate reports the first thing that can never run. It does not look at the
// filesystem.
func (s Spec) Validate() error {
	switch {
	case !cleanText(s.Name, maxNameBytes) || s.Name == "" || strings.ContainsAny(s.Name, "@:/,="):
		return fmt.Errorf("%w: name %q", ErrSpec, s.Name)
	case s.MemoryMiB < MinMemoryMiB || s.MemoryMiB > MaxMemoryMiB:
		return fmt.Errorf("%w: %d MiB of memory; want %d..%d", ErrSpec, s.MemoryMiB, MinMemoryMiB, MaxMemoryMiB)
	case s.VCPUs < 1 || s.VCPUs > MaxVCPUs:
		return fmt.Errorf("%w: %d vCPUs; want 1..%d", ErrSpec, s.VCPUs, MaxVCPUs)
	case s.CPU != "" && !wordPattern.MatchString(s.CPU):
		return fmt.Errorf("%w: CPU model %q", ErrSpec, s.CPU)
	case s.Console != ConsoleSocket && s.Console != ConsoleFile:
		return fmt.Errorf("%w: console of kind %d", ErrSpec, int(s.Console))
	case s.UID == 0 || s.GID == 0:
		return fmt.Errorf("%w: a VM never runs as root or in its group", ErrSpec)
	case len(s.Disks) > MaxDisks:
		return fmt.Errorf("%w: %d disks; at most %d", ErrSpec, len(s.Disks), MaxDisks)
	}
	if err := checkPath("run folder", s.RunDir); err != nil {
		return err
	}
	if n := len(filepath.Join(s.RunDir, consoleSocketName)); n > maxSocketPath {
		return fmt.Errorf("%w: run folder %q is %d bytes too long for a socket address", ErrSpec, s.RunDir, n-maxSocketPath)
	}
	if err := s.Boot.validate(); err != nil {
		return err
	}
	for i, d := range s.Disks {
		if err := d.validate(); err != nil {
			return fmt.Errorf("disk %d: %w", i, err)
		}
	}
	return nil
}

func (b Boot) validate() error {
	if b.Kernel == "" && (b.Initrd != "" || b.Append != "") {
		return fmt.Errorf("%w: an initrd or kernel command line without a kernel", ErrSpec)
	}
	if !cleanText(b.Append, 2047) { // COMMAND_LINE_SIZE of x86 less the NUL
		return fmt.Errorf("%w: kernel command line %q", ErrSpec, b.Append)
	}
	for _, p := range []struct{ what, path string }{{"kernel", b.Kernel}, {"initrd", b.Initrd}, {"firmware", b.BIOS}} {
		if p.path == "" {
			continue
		}
		if err := checkPath(p.what, p.path); err != nil {
			return err
		}
	}
	return nil
}

func (d Disk) validate() error {
	if err := checkPath("NBD socket", d.Socket); err != nil {
		return err
	}
	switch {
	case len(d.Socket) > maxSocketPath:
		return fmt.Errorf("%w: socket path %q is too long for a socket address", ErrSpec, d.Socket)
	case filepath.Dir(d.Socket) == "/":
		return fmt.Errorf("%w: socket %q is not in a folder of its own", ErrSpec, d.Socket)
	case !cleanText(d.Export, maxNameBytes):
		return fmt.Errorf("%w: export name %q", ErrSpec, d.Export)
	case !serialPattern.MatchString(d.Serial):
		return fmt.Errorf("%w: serial %q; want at most %d letters, digits, '.', '_', '-'", ErrSpec, d.Serial, maxSerial)
	}
	return nil
}

// checkPath wants an absolute, clean path. Paths reach QEMU as whole arguments
// or in JSON, so commas and quotes are harmless in them.
func checkPath(what, path string) error {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || !cleanText(path, 4095) {
		return fmt.Errorf("%w: %s %q is not a clean absolute path", ErrSpec, what, path)
	}
	return nil
}

// cleanText is valid UTF-8 of at most maxBytes without control characters.
func cleanText(s string, maxBytes int) bool {
	return len(s) <= maxBytes && utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// checkRights reports what this starter may not give.
func (s Spec) checkRights() error {
	if euid := os.Geteuid(); euid != 0 && (s.UID != uint32(euid) || s.GID != uint32(os.Getegid())) {
		return fmt.Errorf("%w: only root can start a VM as another user (%d:%d)", ErrSpec, s.UID, s.GID)
	}
	return nil
}
