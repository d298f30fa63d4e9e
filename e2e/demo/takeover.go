package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"basalt/e2e/guest"
	"basalt/internal/clock"
)

// deathAt is when host A was killed.
type deathAt struct{ killed, fenced clock.Instant }

// polling is what comes on top of the lease at most: the last heartbeat may be seen
// late, the window is 1 % longer than the lease, and its end is seen late too.
const polling = 3 * time.Second

func (d *demo) killHostA(ctx context.Context) error {
	d.n.say("SIGKILL to host-a (process %d) and to the guest's QEMU (process %d)", d.hostA.cmd.Process.Pid, d.machineA.vm.PID())
	d.death.killed = d.clk.Now()
	if err := errors.Join(d.hostA.cmd.Process.Kill(), d.machineA.vm.Kill()); err != nil {
		return err
	}
	if err := d.hostA.wait(ctx); err != nil {
		return err
	}
	if err := d.machineA.awaitEnd(ctx); err != nil {
		return err
	}
	s := d.machineA.now()
	if s.complain != "" {
		return fmt.Errorf("the guest says: %s", s.complain)
	}
	d.acked = s.acked
	d.n.say("the last record that the guest saw acknowledged: %d", d.acked)
	line, err := d.hostB.await(ctx, 3*d.lease, "to cut off host-a", func(l string) bool {
		return strings.HasPrefix(l, "host host-a ") && strings.Contains(l, "fenced")
	})
	if err != nil {
		return err
	}
	d.death.fenced = d.clk.Now()
	d.n.show(line)
	if strings.Contains(line, "was not fenced") {
		return errors.New("host-b could not make sure that host-a is dead")
	}
	silent := d.death.fenced.Sub(d.death.killed)
	how := "after a full lease of silence"
	if strings.Contains(line, "is gone") {
		how = "proven by the kernel, so sooner than the lease"
	}
	d.n.say("host-b knew and had made sure %s after the kill", seconds(silent))
	d.n.row("A dead host is cut off", fmt.Sprintf("within the lease (%v) and %v", d.lease, polling), fmt.Sprintf("%s, %s", seconds(silent), how))
	if limit := d.lease + polling; silent > limit {
		return fmt.Errorf("host-a was cut off after %v; promised are %v", silent, limit)
	}
	return nil
}

func (d *demo) takeOver(ctx context.Context) error {
	d.n.say("booting the guest again, on host-b; it first verifies what was acknowledged: %d records, the newest in each of %d blocks", d.acked, ringBlocks)
	m, err := d.boot(ctx, d.hostB, exportName(diskPath), guest.Options{Mode: guest.ModeWrite, Acked: d.acked, Blocks: ringBlocks})
	d.machineB = m
	if err != nil {
		return err
	}
	if err := m.await(ctx, guestStep, "verify its disk", func(s machineState) bool { return s.verified }); err != nil {
		return err
	}
	s := m.now()
	if s.found < d.acked {
		return fmt.Errorf("the guest found %d records; %d had been acknowledged", s.found, d.acked)
	}
	d.n.say("the guest verified all of them; the newest on the disk is %d", s.found)
	if err := m.awaitRecord(ctx, s.found+1); err != nil {
		return err
	}
	first := m.now().first
	d.n.say("its next write, %d, was acknowledged %s after the kill, boot of the guest included", s.found+1, seconds(first.Sub(d.death.killed)))
	d.n.row("Acknowledged writes lost", "none", fmt.Sprintf("0 of %d", d.acked))
	d.n.row("The guest writes on another host", "as soon as it boots; no repair", fmt.Sprintf("%s after the kill, %s of them its boot and its own check", seconds(first.Sub(d.death.killed)), seconds(first.Sub(m.started))))
	if err := m.awaitRecord(ctx, s.found+writesElsewhere); err != nil {
		return err
	}
	return d.showCommand(ctx, "disk", "ls", d.lun)
}
