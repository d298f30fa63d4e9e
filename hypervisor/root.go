package hypervisor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// rootPlan is the little root folder that a QEMU lives in.
type rootPlan struct {
	at      string   // an empty folder to mount it on; unused by anyone else
	visible []string // host files and folders shown read-only at their own paths
	devices []device
}

type device struct {
	name         string // below /dev
	major, minor uint32
	uid          uint32 // its owner, with mode 0600; 0: mode 0666
}

// Systems keep programs and libraries below /usr; older ones also in folders that
// newer ones have as links into it.
var systemPaths = []string{"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache", "/etc/alternatives"}

func planRoot(at string, s Spec, accel Accel, opts Options) *rootPlan {
	p := &rootPlan{at: at, visible: slices.Clone(systemPaths)}
	p.visible = append(p.visible, opts.ReadOnlyPaths...)
	for _, path := range []string{s.Boot.Kernel, s.Boot.Initrd, s.Boot.BIOS} {
		if path != "" {
			p.visible = append(p.visible, path)
		}
	}
	for _, d := range s.Disks {
		p.visible = append(p.visible, filepath.Dir(d.Socket))
	}
	// Parents first: a folder mounted later would hide what is mounted below it.
	slices.Sort(p.visible)
	p.visible = slices.Compact(p.visible)
	p.devices = []device{{"null", 1, 3, 0}, {"zero", 1, 5, 0}, {"random", 1, 8, 0}, {"urandom", 1, 9, 0}}
	if accel.Kind == KVM {
		p.devices = append(p.devices, device{"kvm", 10, 232, s.UID})
	}
	return p
}

// enter moves the calling thread into namespaces of its own and the new root. The
// thread is of no other use afterwards, also when enter fails.
func (p *rootPlan) enter() error {
	const own = unix.CLONE_FS | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
	if err := unix.Unshare(own); err != nil {
		return fmt.Errorf("hypervisor: namespaces: %w", err)
	}
	// Folders made here must be open to the VM's user. The mask is this thread's own
	// since CLONE_FS.
	unix.Umask(0o022)
	// Nothing mounted here may spread to the host, nor from it.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("hypervisor: private mounts: %w", err)
	}
	if err := unix.Mount("tmpfs", p.at, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "size=1m,mode=0755"); err != nil {
		return fmt.Errorf("hypervisor: root folder: %w", err)
	}
	for _, path := range p.visible {
		if err := p.show(path); err != nil {
			return fmt.Errorf("hypervisor: show %s: %w", path, err)
		}
	}
	if err := p.makeDevices(); err != nil {
		return fmt.Errorf("hypervisor: device nodes: %w", err)
	}
	return p.pivot()
}

// show makes a host path appear at the same path of the new root.
func (p *rootPlan) show(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) && slices.Contains(systemPaths, path) {
		return nil
	}
	if err != nil {
		return err
	}
	target := filepath.Join(p.at, path)
	// Already there below a folder shown before.
	if have, err := os.Lstat(target); err == nil && os.SameFile(info, have) {
		return nil
	}
	if info.Mode()&fs.ModeSymlink != 0 && slices.Contains(systemPaths, path) {
		to, err := os.Readlink(path)
		if err != nil {
			return err
		}
		return os.Symlink(to, target)
	}
	if err := p.makeTarget(path, target); err != nil {
		return err
	}
	if err := unix.Mount(path, target, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, "")
}

// makeTarget makes an empty file or folder to mount path on.
func (p *rootPlan) makeTarget(path, target string) error {
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return os.MkdirAll(target, 0o755)
	}
	f, err := os.OpenFile(target, os.O_CREATE|os.O_RDONLY, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

func (p *rootPlan) makeDevices() error {
	dev := filepath.Join(p.at, "dev")
	if err := os.MkdirAll(dev, 0o755); err != nil {
		return err
	}
	for _, d := range p.devices {
		path := filepath.Join(dev, d.name)
		mode := uint32(0o666)
		if d.uid != 0 {
			mode = 0o600
		}
		if err := unix.Mknod(path, unix.S_IFCHR|mode, int(unix.Mkdev(d.major, d.minor))); err != nil {
			return err
		}
		// mknod applies the umask.
		if err := errors.Join(os.Chmod(path, fs.FileMode(mode)), os.Chown(path, int(d.uid), 0)); err != nil {
			return err
		}
	}
	return nil
}

// pivot makes the new folder the root and lets go of the old one.
func (p *rootPlan) pivot() error {
	if err := unix.Chdir(p.at); err != nil {
		return fmt.Errorf("hypervisor: enter root: %w", err)
	}
	// Both arguments the same stacks the old root on the new one, so that it can be
	// unmounted without a folder to put it on (pivot_root(2), NOTES).
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("hypervisor: pivot root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("hypervisor: leave old root: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("hypervisor: read-only root: %w", err)
	}
	return unix.Chdir("/")
}
