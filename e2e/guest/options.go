package guest

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Mode is what the guest does after it found its disk.
type Mode string

// Modes of the guest. Each first verifies the ring and stops when it is bad.
const (
	ModeWrite  Mode = "write"  // then goes on writing where the ring ends
	ModeVerify Mode = "verify" // then powers off
	ModeShell  Mode = "shell"  // verifies nothing; a busybox shell on the console
)

// Options are the guest's settings on the kernel command line.
type Options struct {
	Mode   Mode          // mode=, default verify
	Acked  uint64        // acked=, the newest record known to be acknowledged
	Count  uint64        // gmax=, records to write before powering off; 0: write until told
	Delay  time.Duration // gdelay= in milliseconds, between records
	Blocks uint64        // gblocks=, length of a new ring; default 4096, or the whole disk if smaller
	Disk   string        // gdisk=, default /dev/vda
	Run    RunID         // grun=, of a new ring; zero: the guest invents one
}

// DefaultBlocks is the length of a new ring: 16 MiB.
const DefaultBlocks = 4096

// ParseOptions reads a kernel command line and ignores words it does not know.
func ParseOptions(cmdline string) (Options, error) {
	o := Options{Mode: ModeVerify, Blocks: DefaultBlocks, Disk: "/dev/vda"}
	for word := range strings.FieldsSeq(cmdline) {
		key, value, ok := strings.Cut(word, "=")
		if !ok {
			continue
		}
		var err error
		switch key {
		case "mode":
			o.Mode = Mode(value)
		case "acked":
			o.Acked, err = strconv.ParseUint(value, 10, 64)
		case "gmax":
			o.Count, err = strconv.ParseUint(value, 10, 64)
		case "gdelay":
			var ms uint32
			ms, err = parseUint32(value)
			o.Delay = time.Duration(ms) * time.Millisecond
		case "gblocks":
			o.Blocks, err = strconv.ParseUint(value, 10, 64)
		case "gdisk":
			o.Disk = value
		case "grun":
			o.Run, err = ParseRunID(value)
		}
		if err != nil {
			return Options{}, fmt.Errorf("guest: option %q: %w", word, err)
		}
	}
	switch o.Mode {
	case ModeWrite, ModeVerify, ModeShell:
	default:
		return Options{}, fmt.Errorf("guest: no mode %q; want write, verify or shell", string(o.Mode))
	}
	return o, Layout{Blocks: o.Blocks}.Validate()
}

func parseUint32(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err
}

// String is the kernel command line that ParseOptions reads back.
func (o Options) String() string {
	words := []string{"mode=" + string(o.Mode)}
	add := func(key string, n uint64) {
		if n != 0 {
			words = append(words, fmt.Sprintf("%s=%d", key, n))
		}
	}
	add("acked", o.Acked)
	add("gmax", o.Count)
	add("gdelay", uint64(o.Delay.Milliseconds()))
	add("gblocks", o.Blocks)
	if o.Disk != "" {
		words = append(words, "gdisk="+o.Disk)
	}
	if o.Run != (RunID{}) {
		words = append(words, "grun="+o.Run.String())
	}
	return strings.Join(words, " ")
}
