package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"basalt/block"
	"basalt/block/filedev"
	"basalt/datastore"
	"basalt/internal/clock"
	"basalt/lease"
)

// ErrAddress: a LUN address of a kind that this release cannot open.
var ErrAddress = errors.New("store: LUN address not supported")

// Host is who this process is on the volumes that it mounts.
type Host struct {
	Name    string // names the host of the volume
	Server  bool   // serves for long
	RunDir  string // where control sockets lie
	OnBreak func(lease.BreakReport)
	Vouched []string // hosts that a person says are down; see lease.Options
}

// DefaultRunDir is where control sockets lie unless Host.RunDir says otherwise.
const DefaultRunDir = "/run/basalt"

// OpenDevice opens the LUN at an address: a path, so far.
func OpenDevice(lun string, readOnly bool) (*filedev.Device, error) {
	if scheme, _, ok := strings.Cut(lun, "://"); ok {
		return nil, fmt.Errorf("%w: %s: %q is not built yet; use a file or block device", ErrAddress, lun, scheme)
	}
	dev, err := filedev.Open(lun, filedev.Options{ReadOnly: readOnly})
	if err != nil {
		return nil, fmt.Errorf("LUN %s: %w", lun, err)
	}
	return dev, nil
}

// Mount joins the volume on a LUN as the host.
func Mount(ctx context.Context, lun string, h Host, clk clock.Clock, log *slog.Logger) (*datastore.Datastore, error) {
	self, err := filedev.Self()
	if err != nil {
		return nil, err
	}
	id, err := filedev.MachineID()
	if err != nil {
		return nil, err
	}
	dev, err := OpenDevice(lun, false)
	if err != nil {
		return nil, err
	}
	ds, err := datastore.Mount(ctx, dev, dev, clk, log, datastore.Options{
		HostName: h.Name, HostID: id, Process: self, Server: h.Server, OnBreak: h.OnBreak, Vouched: h.Vouched,
	})
	if err != nil {
		if cerr := dev.Close(); cerr != nil && !errors.Is(cerr, block.ErrClosed) {
			err = errors.Join(err, cerr)
		}
		return nil, fmt.Errorf("mount %s: %w", lun, err)
	}
	return ds, nil
}

// View opens the volume on a LUN for reading, without a slot.
func View(ctx context.Context, lun string, clk clock.Clock) (*datastore.Datastore, error) {
	dev, err := OpenDevice(lun, true)
	if err != nil {
		return nil, err
	}
	ds, err := datastore.View(ctx, dev, clk)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", lun, err), dev.Close())
	}
	return ds, nil
}

// RunDirOf is where a volume's control sockets lie.
func RunDirOf(runDir string, volume [16]byte) string {
	if runDir == "" {
		runDir = DefaultRunDir
	}
	return fmt.Sprintf("%s/%x", runDir, volume)
}
