package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"basalt/e2e/guest"
	"basalt/e2e/guest/initrd"
	"basalt/hypervisor"
)

// The guest's ring of records, and when things happen to it, in records. The ring
// is not full when the snapshot is taken and has been overwritten once more at the
// death of host A, so that every block of the snapshot has a newer one beside it.
const (
	ringBlocks      = 2048
	snapshotAt      = 1500
	dieAfter        = ringBlocks // records after the clone
	writesElsewhere = 300        // on host B, before the end
)

const (
	volumeSize = "20G"
	diskSize   = "10G"
	diskPath   = "/vm1/d0"
	clonePath  = "/vm2/d0"
	snapName   = "before"
)

// play tells the whole story.
func (d *demo) play(ctx context.Context) error {
	for _, chapter := range []struct {
		title string
		tell  func(context.Context) error
	}{
		{"A volume on a LUN, and two hosts", d.makeVolume},
		{"A guest writes through host A", d.startGuest},
		{"A snapshot and a clone, while the guest writes", d.snapshotAndClone},
		{"Host A dies", d.killHostA},
		{"Host B goes on with the guest", d.takeOver},
		{"The snapshot and the clone are what they were", d.proveImages},
		{"The end", d.conclude},
	} {
		fmt.Fprintf(d.n.w, "\n%s\n", chapter.title)
		if err := chapter.tell(ctx); err != nil {
			return fmt.Errorf("%s: %w", chapter.title, err)
		}
	}
	d.n.summary()
	return nil
}

func (d *demo) makeVolume(ctx context.Context) error {
	var err error
	if d.img, err = initrd.Build(ctx, ".cache/guest"); err != nil {
		return err
	}
	_, took, err := d.basaltCommand(ctx, "fs", "create", d.lun, "--size", volumeSize, "--label", "demo")
	if err != nil {
		return err
	}
	if d.sizes.lun, d.sizes.empty, err = fileSize(d.lun); err != nil {
		return err
	}
	d.n.say("a volume of %s in %s; the sparse file takes %s", mebibytes(d.sizes.lun), seconds(took), mebibytes(d.sizes.empty))
	var info struct {
		LeaseMillis int64 `json:"lease_ms"`
	}
	if err := d.ask(ctx, &info, "fs", "info", d.lun); err != nil {
		return err
	}
	d.lease = time.Duration(info.LeaseMillis) * time.Millisecond
	if d.hostA, err = d.startHost(ctx, "host-a"); err != nil {
		return err
	}
	if d.hostB, err = d.startHost(ctx, "host-b"); err != nil {
		return err
	}
	return d.showCommand(ctx, "fs", "hosts", d.lun)
}

// showCommand runs a command and shows what it printed.
func (d *demo) showCommand(ctx context.Context, args ...string) error {
	out, _, err := d.basaltCommand(ctx, args...)
	if err == nil {
		d.n.show(out)
	}
	return err
}

func (d *demo) startGuest(ctx context.Context) error {
	for _, args := range [][]string{
		{"fs", "mkdir", d.lun + ":/vm1"}, {"fs", "mkdir", d.lun + ":/vm2"},
		{"disk", "create", d.lun + ":" + diskPath, "--size", diskSize},
	} {
		if _, _, err := d.basaltCommand(ctx, args...); err != nil {
			return err
		}
	}
	d.n.say("booting a Linux guest whose disk is export vm1/d0 of host-a")
	began := d.clk.Now()
	m, err := d.boot(ctx, d.hostA, exportName(diskPath), guest.Options{Mode: guest.ModeWrite, Blocks: ringBlocks})
	d.machineA = m
	if err != nil {
		return err
	}
	d.sayAccelerator(m.vm)
	if err := m.awaitRecord(ctx, 1); err != nil {
		return err
	}
	d.n.say("up and writing after %s: numbered 4 KiB records with checksums, each O_DIRECT + fdatasync, one at a time", seconds(d.clk.Now().Sub(began)))
	if err := m.awaitRecord(ctx, snapshotAt); err != nil {
		return err
	}
	s := m.now()
	middle, longest := middleAndLongest(s.acks)
	d.n.say("%d records acknowledged; seen in the guest: middle %s, longest %s", s.acked, seconds(middle), seconds(longest))
	return nil
}

// exportName is how NBD clients call a disk.
func exportName(path string) string { return strings.TrimPrefix(path, "/") }

func (d *demo) sayAccelerator(vm *hypervisor.VM) {
	a := vm.Accel()
	if a.Kind == hypervisor.TCG {
		d.n.say("accelerator TCG: the guest's processor is translated in software, so all times within it are long (%s)", a.Reason)
	} else {
		d.n.say("accelerator KVM")
	}
	how := "its own user, namespaces and root folder, seccomp"
	if !vm.Confined() {
		how = "this user, seccomp only, for the demo does not run as root"
	}
	d.n.say("QEMU is process %d: %s", vm.PID(), how)
}

func (d *demo) snapshotAndClone(ctx context.Context) error {
	m := d.machineA
	before := m.now()
	_, snapTook, err := d.basaltCommand(ctx, "disk", "snapshot", "create", d.lun+":"+diskPath, snapName)
	if err != nil {
		return err
	}
	d.ackedBefore, d.ackedAfter = before.acked, m.now().acked
	d.n.say("taken in %s, the command's start included; it must hold records 1 to %d, and may hold up to %d", seconds(snapTook), d.ackedBefore, d.ackedAfter+1)
	_, cloneTook, err := d.basaltCommand(ctx, "disk", "clone", d.lun+":"+diskPath+"@"+snapName, d.lun+":"+clonePath)
	if err != nil {
		return err
	}
	// A record that waited for either is acknowledged once one more has come.
	if err := m.awaitRecord(ctx, m.now().acked+2); err != nil {
		return err
	}
	during := m.now()
	usual, _ := middleAndLongest(before.acks)
	_, longest := middleAndLongest(during.acks[len(before.acks):])
	d.n.say("cloned in %s; meanwhile %d records were acknowledged, the slowest in %s", seconds(cloneTook), during.acked-before.acked, seconds(longest))
	d.n.row("Snapshot of a disk in use", "at once, the guest goes on", fmt.Sprintf("%s; slowest write meanwhile %s, middle one before %s", seconds(snapTook), seconds(longest), seconds(usual)))
	var clone struct {
		Mapped    int64 `json:"mapped_bytes"`
		Exclusive int64 `json:"exclusive_bytes"`
	}
	if err := d.ask(ctx, &clone, "disk", "info", d.lun+":"+clonePath); err != nil {
		return err
	}
	d.n.row("Clone of the snapshot", "no data is copied", fmt.Sprintf("%s; all %s shared", seconds(cloneTook), mebibytes(clone.Mapped)))
	if clone.Exclusive != 0 || clone.Mapped == 0 {
		return fmt.Errorf("a new clone has %d bytes mapped, %d of them its own", clone.Mapped, clone.Exclusive)
	}
	if err := m.awaitRecord(ctx, during.acked+dieAfter); err != nil {
		return err
	}
	d.n.say("record %d; every block that the snapshot holds has been overwritten since", m.now().acked)
	return d.showCommand(ctx, "disk", "info", d.lun+":"+diskPath)
}

// fileSize is a file's length and what it takes on its filesystem.
func fileSize(path string) (apparent, allocated int64, err error) {
	const statBlock = 512 // stat(2), st_blocks
	info, err := os.Stat(path)
	if err != nil {
		return 0, 0, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, 0, fmt.Errorf("%s: no stat", path)
	}
	return info.Size(), st.Blocks * statBlock, nil
}
