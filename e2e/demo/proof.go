package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"basalt/e2e/guest"
)

// proveImages reads the snapshot and the clone back and judges every byte.
func (d *demo) proveImages(ctx context.Context) error {
	snap, clone := filepath.Join(d.dir, "snapshot.raw"), filepath.Join(d.dir, "clone.raw")
	d.n.say("the snapshot is read through host-b, while the guest writes")
	for _, c := range []struct{ from, to string }{{diskPath + "@" + snapName, snap}, {clonePath, clone}} {
		_, took, err := d.basaltCommand(ctx, "disk", "export", d.lun+":"+c.from, c.to, "--format", "raw")
		if err != nil {
			return err
		}
		size, allocated, err := fileSize(c.to)
		if err != nil {
			return err
		}
		rep, err := verifyImage(c.to, d.ackedBefore)
		if err != nil {
			return err
		}
		// The first record that began after the snapshot may not be in it.
		if limit := d.ackedAfter + 1; rep.Last > limit {
			return fmt.Errorf("%s holds record %d; it was taken before %d was begun", c.to, rep.Last, limit+1)
		}
		d.n.say("exported in %s: %s, of which %s are data; all %d records acknowledged before the snapshot are there, newest %d",
			seconds(took), mebibytes(size), mebibytes(allocated), d.ackedBefore, rep.Last)
	}
	d.n.say("$ qemu-img compare -f raw -F raw %s %s", snap, clone)
	out, err := runCommand(ctx, "qemu-img", "compare", "-f", "raw", "-F", "raw", snap, clone)
	if err != nil {
		return err
	}
	d.n.show(string(out))
	d.n.row("Snapshot and clone", "the bytes of their moment, whatever is written later", fmt.Sprintf("all %d records in both, images identical", d.ackedBefore))
	return errors.Join(os.Remove(snap), os.Remove(clone))
}

// verifyImage judges a raw image of the guest's disk.
func verifyImage(path string, acked uint64) (guest.Report, error) {
	f, err := os.Open(path)
	if err != nil {
		return guest.Report{}, err
	}
	defer f.Close()
	rep, err := guest.Verify(f, acked)
	if err == nil && !rep.OK() {
		err = fmt.Errorf("%d bad records", rep.BadCount)
		for _, b := range rep.Bad {
			err = fmt.Errorf("%w; record %d in block %d: %s", err, b.Seq, b.Block, b.Reason)
		}
	}
	if err != nil {
		return rep, fmt.Errorf("%s: %w", path, err)
	}
	return rep, nil
}

// conclude ends the guest and the host, unless they are to be kept, and has the
// volume checked.
func (d *demo) conclude(ctx context.Context) error {
	if d.keep {
		d.n.say("KEEP=1: host-b and the guest stay; the check leaves out what host-b holds")
	} else if err := d.endCleanly(ctx); err != nil {
		return err
	}
	// Exit code 6, and so an error, when there is any damage.
	out, took, err := d.basaltCommand(ctx, "fs", "check", d.lun)
	if err != nil {
		return err
	}
	d.n.show(out)
	var check struct {
		Clean    bool `json:"clean"`
		Findings []struct {
			Severity string `json:"severity"`
		} `json:"findings"`
	}
	if err := d.ask(ctx, &check, "fs", "check", d.lun); err != nil {
		return err
	}
	if !check.Clean {
		return fmt.Errorf("the check found %d things", len(check.Findings))
	}
	measured := "fs check: clean, in " + seconds(took)
	if d.keep {
		measured += ", without the disk in use"
	}
	d.n.row("The volume after all that", "sound, nothing leaked", measured)
	for _, args := range [][]string{{"fs", "df", d.lun}, {"disk", "info", d.lun + ":" + diskPath}, {"disk", "info", d.lun + ":" + clonePath}} {
		if err := d.showCommand(ctx, args...); err != nil {
			return err
		}
	}
	_, allocated, err := fileSize(d.lun)
	if err != nil {
		return err
	}
	d.n.row("Thin: space for what is written", "two disks of 10 GiB fit in what they hold", fmt.Sprintf("the LUN file takes %s of %s; %s when it was empty",
		mebibytes(allocated), mebibytes(d.sizes.lun), mebibytes(d.sizes.empty)))
	return nil
}

func (d *demo) endCleanly(ctx context.Context) error {
	s, err := d.machineB.powerOff(ctx)
	if err != nil {
		return err
	}
	d.n.say("the guest obeyed its power button after record %d", s.acked)
	began := d.clk.Now()
	if err := d.hostB.stop(ctx); err != nil {
		return err
	}
	d.n.say("host-b stopped cleanly in %s", seconds(d.clk.Now().Sub(began)))
	return nil
}
