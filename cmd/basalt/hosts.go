package main

import (
	"context"
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"basalt/block"
	"basalt/lease"
	"basalt/store"
	"basalt/vmfs"
)

// hostInfo is a slot as "fs hosts" shows it.
type hostInfo struct {
	Name       string    `json:"name"`
	Slot       int       `json:"slot"`
	Generation uint32    `json:"generation"`
	State      string    `json:"state"` // alive, silent, gone, killed
	Server     bool      `json:"server"`
	Fencing    string    `json:"fencing"`
	Locks      int       `json:"locks"`
	Since      time.Time `json:"since"`
	PID        uint32    `json:"pid"`
}

func (a *app) fsHosts() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use: "hosts LUN", Short: "List the hosts of a volume: liveness, fencing, locks held", Args: args(1, 1),
		RunE: a.onLUN(func(ctx context.Context, lun string) error {
			hosts, err := a.hosts(ctx, lun)
			if err != nil {
				return err
			}
			if a.json {
				return a.emit(items[hostInfo]{hosts})
			}
			w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "HOST\tSLOT\tGENERATION\tSTATE\tFENCING\tLOCKS\tSINCE")
			for _, h := range hosts {
				fmt.Fprintf(w, "%s\t%d\t%d\t%s\t%s\t%d\t%s\n", h.Name, h.Slot, h.Generation, h.State, h.Fencing, h.Locks, h.Since.Format(time.RFC3339))
			}
			return w.Flush()
		}),
	})
}

// hosts looks at all slots twice, more than a heartbeat apart where a host has one,
// to tell the living from the silent.
func (a *app) hosts(ctx context.Context, lun string) ([]hostInfo, error) {
	dev, err := store.OpenDevice(lun, true)
	if err != nil {
		return nil, err
	}
	v, err := vmfs.View(ctx, dev, a.clk)
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	defer func() { _ = v.Close(ctx) }() // it was opened for reading
	first, err := v.Hosts(ctx)
	if err != nil {
		return nil, err
	}
	var pause time.Duration
	for _, s := range first {
		if inUse(s) {
			pause = max(pause, s.Register.Lease/4)
		}
	}
	t := a.clk.NewTimer(pause)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	second, err := v.Hosts(ctx)
	if err != nil {
		return nil, err
	}
	locks, err := v.LocksHeld(ctx)
	if err != nil {
		return nil, err
	}
	out := []hostInfo{}
	for i, s := range second {
		if !inUse(s) {
			continue
		}
		r := s.Register
		state, err := stateOf(ctx, dev, first[i], s)
		if err != nil {
			return nil, err
		}
		out = append(out, hostInfo{
			Name: r.HostName, Slot: s.Slot, Generation: r.Generation, State: state, Server: r.Server, Fencing: r.Fencers.String(),
			Locks: locks[vmfs.Holder{Slot: uint8(s.Slot), Generation: r.Generation}], Since: r.ClaimedAt.UTC(), PID: r.Process.PID,
		})
	}
	return out, nil
}

func inUse(s lease.SlotView) bool {
	return s.Err == nil && (s.Register.Phase == lease.Live || s.Register.Phase == lease.Kill)
}

func stateOf(ctx context.Context, f block.Fencer, was, is lease.SlotView) (string, error) {
	r := is.Register
	gone, err := f.Gone(ctx, is.Holder())
	switch {
	case err != nil:
		return "", err
	case gone:
		return "gone", nil
	case r.Phase == lease.Kill:
		return "killed", nil
	case was.Heartbeat != is.Heartbeat:
		return "alive", nil
	}
	return "silent", nil
}
