package filedev

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"basalt/block"
)

// Self names this process so that a Fencer on the same machine can find it, and
// nobody else in its place.
func Self() (block.Process, error) {
	pid := os.Getpid()
	// A /proc of another pid namespace would describe a stranger under our number.
	link, err := os.Readlink("/proc/self")
	if err != nil {
		return block.Process{}, fmt.Errorf("filedev: this process: %w", err)
	}
	if link != strconv.Itoa(pid) {
		return block.Process{}, fmt.Errorf("filedev: this process: /proc belongs to another pid namespace: it says %s, the kernel says %d", link, pid)
	}
	p := block.Process{PID: uint32(pid)}
	if p.BootID, err = bootID(); err != nil {
		return block.Process{}, err
	}
	if p.StartTicks, err = startTicks(pid); err != nil {
		return block.Process{}, err
	}
	var ns unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &ns); err != nil {
		return block.Process{}, fmt.Errorf("filedev: pid namespace: %w", err)
	}
	p.PIDNS = ns.Ino
	return p, nil
}

// MachineID is the machine's id (machine-id(5)) or, where it has none, its boot's.
func MachineID() ([16]byte, error) {
	if id, err := readID("/etc/machine-id"); err == nil {
		return id, nil
	}
	return bootID()
}

func bootID() ([16]byte, error) { return readID("/proc/sys/kernel/random/boot_id") }

// readID reads a file of 32 hexadecimal digits, with or without dashes.
func readID(path string) (id [16]byte, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return id, fmt.Errorf("filedev: id: %w", err)
	}
	digits := strings.ReplaceAll(strings.TrimSpace(string(text)), "-", "")
	if n, err := hex.Decode(id[:], []byte(digits)[:min(len(digits), 32)]); err != nil || n != len(id) {
		return id, fmt.Errorf("filedev: id: %s holds %q", path, text)
	}
	return id, nil
}

// startTicks reads field 22 of /proc/PID/stat (proc(5)).
func startTicks(pid int) (uint64, error) {
	path := fmt.Sprintf("/proc/%d/stat", pid)
	stat, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("filedev: start time: %w", err)
	}
	// Field 2, the name, may hold spaces and parentheses; field 3 follows its last ')'.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const startField, firstField = 22, 3
	if len(fields) <= startField-firstField {
		return 0, fmt.Errorf("filedev: start time: %s has %d fields", path, len(fields)+firstField-1)
	}
	ticks, err := strconv.ParseUint(fields[startField-firstField], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("filedev: start time: %s: %w", path, err)
	}
	return ticks, nil
}
