//go:build e2e

package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"basalt/e2e/guest"
	"basalt/e2e/guest/initrd"
	"basalt/hypervisor"
	"basalt/hypervisor/qmp"
	"basalt/internal/clock"
)

// vmUser is the guests' QEMU's user and group.
const vmUser = 2000031

// guestPatience bounds a guest's whole life under TCG.
const guestPatience = 4 * time.Minute

// vm is a running guest and what it has said. Its console is always read: a guest
// whose words nobody takes stands still.
type vm struct {
	*hypervisor.VM
	t    *testing.T
	read chan struct{} // closed at the console's end

	mu    sync.Mutex // guards the rest
	acked uint64     // newest record that the guest called durable
	done  bool       // the guest powers off
	wrong string     // what it complained of
}

func (v *vm) listen(c *guest.Console) {
	defer close(v.read)
	for {
		line, err := c.Next()
		if err != nil {
			return
		}
		v.mu.Lock()
		switch line.Kind {
		case guest.LineAck:
			v.acked = line.Seq
		case guest.LineBad, guest.LineError:
			v.wrong = line.String()
		case guest.LineDone:
			v.done = true
		case guest.LineOther, guest.LineReady, guest.LineVerified:
		}
		v.mu.Unlock()
	}
}

// state is the newest acknowledged record, and whether the guest powers off.
func (v *vm) state() (acked uint64, done bool) {
	v.t.Helper()
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.wrong != "" {
		v.t.Fatalf("guest %s says %q after record %d", v.Name(), v.wrong, v.acked)
	}
	return v.acked, v.done
}

// writes waits for n further records and returns the newest.
func (v *vm) writes(n uint64) uint64 {
	v.t.Helper()
	from, _ := v.state()
	eventually(v.t, guestPatience, fmt.Sprintf("guest %s writes record %d", v.Name(), from+n), func() bool {
		acked, done := v.state()
		return acked >= from+n || done
	})
	acked, _ := v.state()
	return acked
}

// off waits for the guest's own power-off and returns the newest record.
func (v *vm) off() uint64 {
	v.t.Helper()
	eventually(v.t, guestPatience, "guest "+v.Name()+" powers off", func() bool {
		_, done := v.state()
		return done
	})
	ctx, cancel := context.WithTimeout(v.t.Context(), time.Minute)
	defer cancel()
	if exit, err := v.Wait(ctx); err != nil || exit.Code != 0 || exit.Signal != 0 {
		v.t.Fatalf("guest %s ended as %v, %v; want a power-off", v.Name(), exit, err)
	}
	<-v.read
	acked, _ := v.state()
	return acked
}

// guestServer starts a server whose socket a guest's QEMU may use.
func (s *site) guestServer(more ...string) *server {
	s.t.Helper()
	dir := s.path("nbd")
	if err := os.MkdirAll(dir, 0o711); err != nil {
		s.t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	args := append([]string{"disk", "serve", s.lun, "--nbd", "unix:" + socket, "--nbd-owner", fmt.Sprintf("%d:%d", vmUser, vmUser)}, more...)
	v := &server{start(s.t, "server "+s.host, s.command(context.Background(), args...)), socket}
	v.says(30*time.Second, " serves on ")
	return v
}

// boot starts a guest on an export.
func (s *site) boot(name, socket, export string, opts guest.Options) *vm {
	t := s.t
	t.Helper()
	needTool(t, "qemu-system-x86_64")
	if os.Geteuid() != 0 {
		t.Skip("confinement of a guest needs root")
	}
	img, err := initrd.Build(t.Context(), filepath.Join("..", ".cache", "guest"))
	if err != nil {
		t.Skipf("no test guest: %v", err)
	}
	spec := hypervisor.Spec{
		Name: name, MemoryMiB: 192, VCPUs: 1, UID: vmUser, GID: vmUser, RunDir: s.path("vm-" + name), NoReboot: true,
		Boot:  hypervisor.Boot{Kernel: img.Kernel, Initrd: img.Initrd, Append: "console=ttyS0 quiet panic=-1 " + opts.String()},
		Disks: []hypervisor.Disk{{Socket: socket, Export: export, Serial: "disk0"}},
	}
	v, err := hypervisor.Start(t.Context(), clock.System{}, slog.New(slog.NewTextHandler(t.Output(), nil)), spec, hypervisor.Options{Paused: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(v.Kill(), v.Close()); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	conn, err := net.Dial("unix", v.ConsolePath())
	if err != nil {
		t.Fatal(err)
	}
	g := &vm{VM: v, t: t, read: make(chan struct{})}
	go g.listen(guest.NewConsole(conn))
	t.Cleanup(func() {
		conn.Close()
		<-g.read
	})
	if err := v.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	return g
}

// verifyDisk exports a disk and judges the guest's records on it.
func (s *site) verifyDisk(path string, acked uint64) guest.Report {
	s.t.Helper()
	file := s.path("guest.raw")
	s.ok("disk", "export", s.at(path), file, "--format", "raw", "--yes")
	f, err := os.Open(file)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	rep, err := guest.Verify(f, acked)
	if err != nil {
		s.t.Fatal(err)
	}
	if !rep.OK() || rep.Last < acked {
		s.t.Errorf("%s: %d records were acknowledged; the disk shows %+v", path, acked, rep)
	}
	return rep
}

func TestGuestLivesThroughKilledServers(t *testing.T) {
	s := newSite(t, "--size", "512M", "--lease", "60s")
	s.ok("disk", "create", s.at("/d"), "--size", "64M")
	v := s.guestServer()
	g := s.boot("g", v.socket, "d", guest.Options{Mode: guest.ModeWrite, Count: 1500, Delay: time.Millisecond})
	var snapped uint64
	for round := range 4 {
		at := g.writes(150)
		if round == 2 {
			s.ok("disk", "snapshot", "create", s.at("/d"), "running")
			snapped = at
		}
		v.kill()
		v = s.guestServer()
		g.writes(50)
	}
	acked := g.off()
	v.stop()
	rep := s.verifyDisk("/d", acked)
	if acked != 1500 || rep.Last != 1500 {
		t.Errorf("acknowledged %d, on the disk %d; want 1500", acked, rep.Last)
	}
	for e := range g.Events() {
		if e.Name == "BLOCK_IO_ERROR" {
			t.Errorf("an outage reached the guest: %s", e.Data)
		}
	}
	if rep := s.verifyDisk("/d@running", snapped); rep.Last >= 1500 {
		t.Errorf("the snapshot of the running guest shows %+v", rep)
	}
	s.checkClean()
	t.Logf("the guest wrote %d records over 5 servers; snapshot and disk verify", acked)
}

// A full volume pauses the guest; space brings it back, and it never hears of it.
func TestGuestWaitsForSpace(t *testing.T) {
	s := newSite(t, "--size", "128M", "--lease", "60s")
	s.ok("disk", "create", s.at("/d"), "--size", "64M")
	free := decode[volume](s, "fs", "df", s.lun)
	// What is left holds a part of the guest's ring of 16 MiB.
	s.okWith(noise(1, int(free.FreeBytes-free.ReserveBytes-10<<20)), "fs", "put", "-", s.at("/ballast"))
	v := s.guestServer()
	g := s.boot("g", v.socket, "d", guest.Options{Mode: guest.ModeWrite, Count: 4096})
	awaitNoSpace(g)
	if d := decode[volume](s, "fs", "df", s.lun); d.FreeBytes > d.ReserveBytes {
		t.Errorf("the guest was paused with space left: %+v", d)
	}
	s.ok("fs", "rm", s.at("/ballast"), "--yes")
	if err := g.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	acked := g.off()
	v.stop()
	if rep := s.verifyDisk("/d", acked); rep.Last != 4096 {
		t.Errorf("the disk shows %+v; want 4096 records", rep)
	}
	s.checkClean()
	t.Logf("paused when the volume was full, went on to record %d", acked)
}

// awaitNoSpace waits until the guest stands still for want of space.
func awaitNoSpace(g *vm) {
	g.t.Helper()
	late := clock.System{}.NewTimer(guestPatience)
	defer late.Stop()
	for noSpace := false; ; {
		select {
		case e, ok := <-g.Events():
			if !ok {
				g.t.Fatal("the monitor is gone")
			}
			if e.Name == "BLOCK_IO_ERROR" {
				var data struct{ NoSpace bool }
				if err := json.Unmarshal(e.Data, &data); err != nil || !data.NoSpace {
					g.t.Fatalf("event %s (%v)", e.Data, err)
				}
				noSpace = true
			}
			// STOP may come before or after its cause.
			state, err := g.QMP().Status(g.t.Context())
			if err != nil {
				g.t.Fatal(err)
			}
			if noSpace && state == qmp.StateIOError {
				return
			}
		case <-late.C:
			g.t.Fatal("the guest was not paused")
		}
	}
}
