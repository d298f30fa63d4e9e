package hypervisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Names in a run folder.
const (
	lockName          = "lock"         // flocked by the QEMU's inherited descriptor
	recordName        = "vm.json"      // a record
	qmpName           = "qmp.sock"     // QEMU's monitor, one client at a time
	logName           = "qemu.log"     // QEMU's own words
	consoleSocketName = "console.sock" // Spec.Console ConsoleSocket
	consoleLogName    = "console.log"  // Spec.Console ConsoleFile
	rootName          = "root"         // where QEMU's root is mounted, in its namespace
)

// record is what Attach needs to find a running QEMU.
type record struct {
	Name       string `json:"name"`
	PID        int    `json:"pid"`
	StartTicks uint64 `json:"start_ticks"` // clock ticks since boot
	BootID     string `json:"boot_id"`
	Accel      Accel  `json:"accel"`
	Confined   bool   `json:"confined"`
	Console    string `json:"console"` // path of the socket or file
}

func readRecord(runDir string) (record, error) {
	var r record
	b, err := os.ReadFile(filepath.Join(runDir, recordName))
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("hypervisor: %s: %w", filepath.Join(runDir, recordName), err)
	}
	if r.PID <= 1 {
		return r, fmt.Errorf("hypervisor: %s: pid %d", filepath.Join(runDir, recordName), r.PID)
	}
	return r, nil
}

// write replaces the record at once: a reader sees the old or the new one. It
// need not survive the boot, as no QEMU does.
func (r record) write(runDir string) error {
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(runDir, recordName+".")
	if err != nil {
		return err
	}
	_, err = tmp.Write(append(b, '\n'))
	if err := errors.Join(err, tmp.Close()); err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	return os.Rename(tmp.Name(), filepath.Join(runDir, recordName))
}
