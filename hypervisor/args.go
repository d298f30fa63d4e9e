package hypervisor

import (
	"encoding/json"
	"fmt"
	"strconv"
)

// File descriptors that QEMU inherits. 0 is empty, 1 and 2 are its log.
const (
	fdLock    = 3 // holds the run folder's lock while QEMU lives
	fdQMP     = 4 // a listening unix socket
	fdConsole = 5 // a listening unix socket, or a file open for appending
)

// reconnectDelaySeconds is how long QEMU holds requests while the NBD server is
// away, before the guest is paused: a day, for an outage must cost a pause and
// never an error.
const reconnectDelaySeconds = 86400

// consoleFdSet is the number by which QEMU knows fdConsole as a file.
const consoleFdSet = 1

// The JSON forms of -blockdev and -device. JSON has no commas to escape, so no
// name can smuggle in an option.
type (
	blockdevArg struct {
		Driver         string     `json:"driver"`
		NodeName       string     `json:"node-name"`
		Server         serverArg  `json:"server"`
		Export         string     `json:"export"`
		ReconnectDelay int        `json:"reconnect-delay"`
		Cache          cacheArg   `json:"cache"`
		Discard        string     `json:"discard"`
		DetectZeroes   detectMode `json:"detect-zeroes"`
		ReadOnly       bool       `json:"read-only"`
	}
	serverArg struct {
		Type string `json:"type"`
		Path string `json:"path"`
	}
	cacheArg struct {
		Direct bool `json:"direct"`
	}
	detectMode string
	deviceArg  struct {
		Driver    string `json:"driver"`
		ID        string `json:"id"`
		Drive     string `json:"drive"`
		BootIndex int    `json:"bootindex,omitempty"` // counts from 1; lower boots first
		Werror    string `json:"werror"`
		Rerror    string `json:"rerror"`
		Serial    string `json:"serial,omitempty"`
	}
)

// detectOff leaves zeros to the storage, which finds them as it checksums; QEMU
// would look at every byte of every write, and unmap what an eager disk mapped.
const detectOff detectMode = "off"

// arguments returns QEMU's arguments for a valid spec, without the program's
// name. It depends on nothing else.
func arguments(s Spec, accel Accel) []string {
	args := []string{
		"-name", "guest=" + s.Name + ",debug-threads=on",
		"-nodefaults", "-no-user-config", "-S",
		"-display", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-msg", "timestamp=on",
		"-machine", "q35,vmport=off,dump-guest-core=off",
		"-accel", accel.argument(),
		"-cpu", accel.cpu(s),
		"-smp", strconv.Itoa(s.VCPUs),
		"-m", strconv.Itoa(s.MemoryMiB) + "M",
		"-overcommit", "mem-lock=off",
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=off", fdQMP),
		"-mon", "chardev=qmp,mode=control",
	}
	switch s.Console {
	case ConsoleSocket:
		args = append(args, "-chardev", fmt.Sprintf("socket,id=console,fd=%d,server=on,wait=off", fdConsole))
	case ConsoleFile:
		args = append(args,
			"-add-fd", fmt.Sprintf("fd=%d,set=%d", fdConsole, consoleFdSet),
			"-chardev", fmt.Sprintf("file,id=console,path=/dev/fdset/%d,append=on", consoleFdSet))
	}
	args = append(args, "-serial", "chardev:console")
	if s.NoReboot {
		args = append(args, "-action", "reboot=shutdown")
	}
	args = append(args, s.Boot.arguments()...)
	for i, d := range s.Disks {
		args = append(args, d.arguments(i, s.Boot)...)
	}
	return args
}

func (b Boot) arguments() []string {
	var args []string
	if b.BIOS != "" {
		args = append(args, "-bios", b.BIOS)
	}
	if b.Kernel == "" {
		return args
	}
	args = append(args, "-kernel", b.Kernel)
	if b.Initrd != "" {
		args = append(args, "-initrd", b.Initrd)
	}
	if b.Append != "" {
		args = append(args, "-append", b.Append)
	}
	return args
}

func (d Disk) arguments(i int, boot Boot) []string {
	// A kernel on the command line takes the first place itself.
	bootIndex := i + 1
	if boot.Kernel != "" {
		bootIndex = 0
	}
	node := fmt.Sprintf("disk%d", i)
	return []string{
		"-blockdev", jsonArgument(blockdevArg{
			Driver: "nbd", NodeName: node,
			Server: serverArg{Type: "unix", Path: d.Socket}, Export: d.Export,
			ReconnectDelay: reconnectDelaySeconds, Cache: cacheArg{Direct: true},
			Discard: "unmap", DetectZeroes: detectOff, ReadOnly: d.ReadOnly,
		}),
		"-device", jsonArgument(deviceArg{
			Driver: "virtio-blk-pci", ID: fmt.Sprintf("vd%d", i), Drive: node, BootIndex: bootIndex,
			Werror: "stop", Rerror: "stop", Serial: d.Serial,
		}),
	}
}

func jsonArgument(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic("hypervisor: " + err.Error()) // structs of strings, numbers and booleans
	}
	return string(b)
}
