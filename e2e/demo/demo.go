package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"basalt/e2e/guest/initrd"
	"basalt/internal/clock"
)

// vmUser is the guest's user and group when the demo runs as root; nobody else has
// it.
const vmUser = 2000021

// cleanUpLimit bounds each step of the cleaning up.
const cleanUpLimit = 20 * time.Second

// demo is one run.
type demo struct {
	n    *narrator
	clk  clock.Clock
	log  *slog.Logger // of package hypervisor, to a file
	keep bool
	// keepLogs leaves the folder, for a person to look into.
	keepLogs bool
	basalt   string // path of the program
	dir      string // everything that the run writes
	lun      string
	runDir   string // of control sockets
	uid      uint32 // of the guest's QEMU
	gid      uint32
	img      initrd.Image
	leaves   []leave // what is to be undone, newest last

	hostA, hostB       *host
	machineA, machineB *machine
	sizes              struct{ lun, empty int64 } // of the LUN file: apparent; allocated before any disk
	lease              time.Duration
	death              deathAt
	ackedBefore        uint64 // records acknowledged before the snapshot was asked for
	ackedAfter         uint64 // and when it had been taken
	acked              uint64 // by the guest on host A, in all
}

// leave undoes one thing.
type leave struct {
	what string
	do   func(context.Context) error
}

func newDemo(n *narrator, keep bool) (*demo, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	d := &demo{n: n, clk: n.clk, keep: keep, basalt: filepath.Join(filepath.Dir(self), "basalt"), uid: vmUser, gid: vmUser}
	if _, err := os.Stat(d.basalt); err != nil {
		return nil, fmt.Errorf("no basalt beside the demo (make build makes it): %w", err)
	}
	if os.Geteuid() != 0 {
		d.uid, d.gid = uint32(os.Geteuid()), uint32(os.Getegid())
	}
	// /var/tmp is on a disk where /tmp may be memory.
	parent := os.Getenv("TMPDIR")
	if parent == "" {
		parent = "/var/tmp"
	}
	if d.dir, err = os.MkdirTemp(parent, "basalt-demo-"); err != nil {
		return nil, err
	}
	d.later("remove the folder", func(context.Context) error {
		if d.keepLogs {
			return nil
		}
		return os.RemoveAll(d.dir)
	})
	d.lun, d.runDir = filepath.Join(d.dir, "lun"), filepath.Join(d.dir, "run")
	log, err := os.Create(filepath.Join(d.dir, "demo.log"))
	if err != nil {
		return nil, errors.Join(err, d.cleanUp())
	}
	d.later("close the log", func(context.Context) error { return log.Close() })
	d.log = slog.New(slog.NewTextHandler(log, nil))
	n.say("D=%s; what follows happens there", d.dir)
	n.abbreviate(d.dir, "$D")
	return d, nil
}

// later adds something to undo at the end, before all that was added earlier.
func (d *demo) later(what string, do func(context.Context) error) {
	d.leaves = append(d.leaves, leave{what, do})
}

// cleanUp undoes everything, whatever fails. It is not interrupted.
func (d *demo) cleanUp() error {
	var all error
	for _, l := range slices.Backward(d.leaves) {
		ctx, cancel := context.WithTimeout(context.Background(), cleanUpLimit)
		if err := l.do(ctx); err != nil {
			all = errors.Join(all, fmt.Errorf("%s: %w", l.what, err))
		}
		cancel()
	}
	d.leaves = nil
	if all != nil {
		d.n.say("FAILED to clean up: %v", all)
	}
	return all
}

// logTailBytes is how much of a log is printed after a failure.
const logTailBytes = 3000

// printLogs shows the ends of the logs and of the guests' consoles.
func (d *demo) printLogs() {
	names, err := filepath.Glob(filepath.Join(d.dir, "*.log"))
	if err != nil {
		names = nil // only a bad pattern fails
	}
	for _, run := range []string{"vm-host-a", "vm-host-b"} {
		names = append(names, filepath.Join(d.dir, run, "qemu.log"))
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil || len(b) == 0 {
			continue
		}
		d.n.say("the end of %s:", name)
		d.n.show(strings.ToValidUTF8(string(b[max(0, len(b)-logTailBytes):]), "?"))
	}
	for _, m := range []*machine{d.machineA, d.machineB} {
		if m == nil {
			continue
		}
		d.n.say("the end of the console of %s:", m.runDir)
		d.n.show(strings.Join(m.lastWords(), "\n"))
	}
}
