package main

import (
	"context"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
)

// An input_event of the kernel is a 16-byte time, then type, code and value.
const (
	inputEventBytes = 24
	evKey           = 1
	keyPower        = 116
)

// watchPowerButton calls pressed when the host asks for a shutdown by ACPI. Its
// readers live as long as the guest: only ctx or a broken device ends them.
func watchPowerButton(ctx context.Context, pressed func()) {
	paths, err := filepath.Glob("/dev/input/event*")
	if err != nil {
		return
	}
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		go func() {
			defer f.Close()
			var ev [inputEventBytes]byte
			for ctx.Err() == nil {
				if _, err := io.ReadFull(f, ev[:]); err != nil {
					return
				}
				kind, code := binary.LittleEndian.Uint16(ev[16:]), binary.LittleEndian.Uint16(ev[18:])
				if kind == evKey && code == keyPower && binary.LittleEndian.Uint32(ev[20:]) == 1 {
					pressed()
				}
			}
		}()
	}
}
