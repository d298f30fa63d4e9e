// Command guestinit is the /init of the test guest: it loads the virtio modules
// of its initrd, verifies the ring of package guest on its disk, goes on writing
// it, and says so on the serial console. Its settings are on the kernel command
// line; see guest.Options.
//
// It acknowledges a record only after fdatasync returned, on a disk opened with
// O_DIRECT, so that a line "W n" is a promise about stable storage.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"

	"basalt/e2e/guest"
	"basalt/internal/clock"
)

// diskWait bounds how long the disk may take to appear.
const diskWait = 60 * time.Second

func main() {
	if err := run(clock.System{}); err != nil {
		say(guest.Line{Kind: guest.LineError, Text: err.Error()})
	}
	say(guest.Line{Kind: guest.LineDone})
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		say(guest.Line{Kind: guest.LineError, Text: "power off: " + err.Error()})
	}
	select {} // the kernel panics when its init returns
}

func run(clk clock.Clock) error {
	if os.Getpid() != 1 {
		return errors.New("guestinit is the init of a guest, not a program of a host")
	}
	if err := mountBasics(); err != nil {
		return err
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	opts, err := guest.ParseOptions(string(cmdline))
	if err != nil {
		return err
	}
	if err := loadModules("/lib/modules"); err != nil {
		return err
	}
	if opts.Mode == guest.ModeShell {
		return shell()
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	watchPowerButton(ctx, stop)

	disk, err := openDisk(ctx, clk, opts.Disk)
	if err != nil {
		return err
	}
	defer func() { _ = disk.Close() }() // every record was synced before
	say(guest.Line{Kind: guest.LineReady})
	ring, err := disk.verify(opts)
	if err != nil {
		return err
	}
	if opts.Mode == guest.ModeVerify {
		return nil
	}
	return disk.write(ctx, clk, ring, opts)
}

func say(l guest.Line) { fmt.Println(l) }

func mountBasics() error {
	for _, m := range []struct{ dir, kind string }{{"/proc", "proc"}, {"/sys", "sysfs"}, {"/dev", "devtmpfs"}} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	return nil
}

func shell() error {
	cmd := exec.Command("/bin/busybox", "sh")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = []string{"PATH=/bin", "HOME=/", "TERM=linux"}
	return cmd.Run()
}
