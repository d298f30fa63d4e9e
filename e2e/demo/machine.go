package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"basalt/e2e/guest"
	"basalt/hypervisor"
	"basalt/internal/clock"
)

const (
	guestMemoryMiB = 192
	guestBoot      = 90 * time.Second // to the first word of its init
	guestStep      = 3 * time.Minute  // for anything it does afterwards; slow disks write some dozen records a second
	guestPowerOff  = 30 * time.Second
	tailLines      = 20 // of the console, kept for a failure
)

// machine is a running guest and what its console has said.
type machine struct {
	vm      *hypervisor.VM
	clk     clock.Clock
	started clock.Instant // of its first instruction
	runDir  string
	console net.Conn
	reader  sync.WaitGroup

	mu      sync.Mutex // guards the rest
	state   machineState
	tail    []string
	changed chan struct{} // closed and replaced when state changes
}

// machineState is what the console has said so far.
type machineState struct {
	ready    bool
	verified bool
	found    uint64 // records that the guest verified
	acked    uint64 // newest record acknowledged
	first    clock.Instant
	acks     []time.Duration // guest's latency of each record acknowledged
	ended    error           // the console's end
	complain string          // what the guest found wrong
}

// boot starts a guest on a host's export, and reads its console from the first
// byte on.
func (d *demo) boot(ctx context.Context, h *host, export string, opts guest.Options) (*machine, error) {
	m := &machine{clk: d.clk, runDir: filepath.Join(d.dir, "vm-"+h.name), changed: make(chan struct{})}
	var err error
	m.vm, err = hypervisor.Start(ctx, d.clk, d.log, hypervisor.Spec{
		Name: "guest", MemoryMiB: guestMemoryMiB, VCPUs: 1, UID: d.uid, GID: d.gid, RunDir: m.runDir, NoReboot: true,
		Boot:  hypervisor.Boot{Kernel: d.img.Kernel, Initrd: d.img.Initrd, Append: "console=ttyS0 quiet panic=-1 " + opts.String()},
		Disks: []hypervisor.Disk{{Socket: h.socket, Export: export, Serial: "d0"}},
	}, hypervisor.Options{Paused: true})
	if err != nil {
		return nil, err
	}
	d.later("end the guest of "+h.name, m.end)
	if m.console, err = net.Dial("unix", m.vm.ConsolePath()); err != nil {
		return nil, err
	}
	m.reader.Go(m.read)
	m.started = d.clk.Now()
	if err := m.vm.Resume(ctx); err != nil {
		return nil, err
	}
	return m, m.await(ctx, guestBoot, "find its disk", func(s machineState) bool { return s.ready })
}

// read follows the console to its end.
func (m *machine) read() {
	c := guest.NewConsole(m.console)
	for {
		line, err := c.Next()
		m.mu.Lock()
		m.hear(line, err)
		close(m.changed)
		m.changed = make(chan struct{})
		m.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// hear takes in one line of the console. The caller holds mu.
func (m *machine) hear(line guest.Line, err error) {
	if err != nil {
		m.state.ended = err
		return
	}
	s := &m.state
	switch line.Kind {
	case guest.LineReady:
		s.ready = true
	case guest.LineVerified:
		s.verified, s.found = true, line.Seq
	case guest.LineAck:
		if len(s.acks) == 0 {
			s.first = m.clk.Now()
		}
		s.acked = line.Seq
		s.acks = append(s.acks, line.Latency)
		return // too many for the tail
	case guest.LineBad, guest.LineError:
		s.complain = line.String()
	case guest.LineDone, guest.LineOther:
	}
	m.tail = append(m.tail, line.String())
	m.tail = m.tail[max(0, len(m.tail)-tailLines):]
}

// now is what the console has said.
func (m *machine) now() machineState {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.state
	s.acks = slices.Clone(s.acks)
	return s
}

// await waits until the console has said enough.
func (m *machine) await(ctx context.Context, limit time.Duration, what string, enough func(machineState) bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("nothing within %v", limit))
	defer cancel()
	for {
		m.mu.Lock()
		s, changed := m.state, m.changed
		ok := enough(s)
		m.mu.Unlock()
		switch {
		case s.complain != "":
			return fmt.Errorf("the guest says: %s", s.complain)
		case ok:
			return nil
		case s.ended != nil:
			return fmt.Errorf("waiting for the guest to %s: its console ended: %w", what, s.ended)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("waiting for the guest to %s: %w", what, context.Cause(ctx))
		}
	}
}

// awaitRecord waits until the guest has acknowledged a record.
func (m *machine) awaitRecord(ctx context.Context, seq uint64) error {
	return m.await(ctx, guestStep, fmt.Sprintf("write record %d", seq), func(s machineState) bool { return s.acked >= seq })
}

// powerOff presses the power button and waits for the guest's end. The state is
// what the console had said by then.
func (m *machine) powerOff(ctx context.Context) (machineState, error) {
	if err := m.vm.Shutdown(ctx, guestPowerOff); err != nil {
		return machineState{}, err
	}
	m.reader.Wait()
	s := m.now()
	if s.complain != "" {
		return s, fmt.Errorf("the guest says: %s", s.complain)
	}
	return s, nil
}

// awaitEnd waits for a QEMU that was killed; every line its console had sent has
// been heard then.
func (m *machine) awaitEnd(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, killWait)
	defer cancel()
	if _, err := m.vm.Wait(ctx); err != nil {
		return err
	}
	m.reader.Wait() // QEMU's end ends its sockets
	return nil
}

// end kills the QEMU if it still runs, waits for it and lets go of it.
func (m *machine) end(ctx context.Context) error {
	err := m.vm.Kill()
	if err == nil {
		_, err = m.vm.Wait(ctx)
	}
	return errors.Join(err, m.letGo())
}

// letGo leaves the QEMU as it is.
func (m *machine) letGo() error {
	var err error
	if m.console != nil {
		err = m.console.Close()
	}
	m.reader.Wait()
	return errors.Join(err, m.vm.Close())
}

// lastWords are the console's last lines other than acknowledgements.
func (m *machine) lastWords() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	words := slices.Clone(m.tail)
	if m.state.ended != nil && !errors.Is(m.state.ended, io.EOF) {
		words = append(words, m.state.ended.Error())
	}
	return words
}

// middleAndLongest are of a list that is not empty.
func middleAndLongest(list []time.Duration) (middle, longest time.Duration) {
	sorted := slices.Sorted(slices.Values(list))
	return sorted[len(sorted)/2], sorted[len(sorted)-1]
}
