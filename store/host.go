package store

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
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
	id, err := machineID()
	if err != nil {
		return nil, err
	}
	dev, err := OpenDevice(lun, false)
	if err != nil {
		return nil, err
	}
	ds, err := datastore.Mount(ctx, dev, dev, clk, log, datastore.Options{
		HostName: h.Name, HostID: id, Process: self, Server: h.Server, OnBreak: h.OnBreak,
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

// machineID is the machine's id (machine-id(5)), or its boot's where it has none.
func machineID() ([16]byte, error) {
	var id [16]byte
	for _, path := range []string{"/etc/machine-id", "/proc/sys/kernel/random/boot_id"} {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		text := strings.ReplaceAll(strings.TrimSpace(string(b)), "-", "")
		if n, err := hex.Decode(id[:], []byte(text)); err == nil && n == len(id) {
			return id, nil
		}
	}
	return id, errors.New("store: this machine has neither /etc/machine-id nor a boot id")
}

// RunDirOf is where a volume's control sockets lie.
func RunDirOf(runDir string, volume [16]byte) string {
	if runDir == "" {
		runDir = DefaultRunDir
	}
	return fmt.Sprintf("%s/%x", runDir, volume)
}
