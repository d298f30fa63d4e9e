package lease_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"basalt/lease"
)

var rewrite = flag.Bool("rewrite", false, "write the outcome of testdata/*.txt instead of comparing it")

// TestScripts runs testdata/*.txt: lines that begin with "> " are commands, those
// that follow are their output. The first lines tell what a script guards.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no scripts", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var got strings.Builder
			inSite(t, 3, func(t *testing.T, x *site) {
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				s := &script{ctx: ctx, x: x, hosts: make(map[string]*machine), started: make(map[string]<-chan error)}
				for line := range strings.Lines(string(want)) {
					command, ok := strings.CutPrefix(strings.TrimSpace(line), "> ")
					switch {
					case ok:
						fmt.Fprintf(&got, "> %s\n%s", command, s.run(strings.Fields(command)))
					case strings.HasPrefix(line, "#"), strings.TrimSpace(line) == "":
						got.WriteString(line)
					}
				}
				cancel() // of what a dead host has started
				for _, done := range s.started {
					<-done
				}
			})
			if *rewrite {
				if err := os.WriteFile(file, []byte(got.String()), 0o666); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got.String() != string(want) {
				t.Fatalf("got:\n%s", got.String())
			}
		})
	}
}

type script struct {
	ctx     context.Context // of what is started in the background
	x       *site
	hosts   map[string]*machine
	started map[string]<-chan error // by host
}

func (s *script) host(name string) *machine {
	if s.hosts[name] == nil {
		s.hosts[name] = s.x.machine(name)
	}
	return s.hosts[name]
}

// run performs one command and returns its output.
func (s *script) run(c []string) string {
	x := s.x
	switch c[0] {
	case "tick":
		d, err := time.ParseDuration(c[1])
		if err != nil {
			x.t.Fatal(err)
		}
		x.tick(d)
		return ""
	case "slots":
		return s.slots()
	case "data":
		return fmt.Sprintf("%q\n", x.data())
	}
	m := s.host(c[1])
	switch c[0] {
	case "claim":
		if err := m.tryClaim(); err != nil {
			return s.outcome(err)
		}
		return fmt.Sprintf("slot %d generation %d\n", m.s.Slot(), m.s.Generation())
	case "freeze":
		m.freeze()
	case "thaw":
		m.thaw()
	case "kill":
		m.nexus.Kill()
	case "hold":
		m.nexus.HoldWrites()
	case "land":
		if err := land(m); err != nil {
			return s.outcome(err)
		}
	case "unfenced": // its fencer does nothing
		m.fencer = paperFencer{}
	case "before-change":
		m.dev.set(func(w *wire) { w.beforeCAW = func() { s.aside(c[2:]) } })
	case "before-second-change":
		m.dev.set(func(w *wire) {
			w.afterCAW = func() {
				m.dev.set(func(w *wire) { w.beforeCAW = func() { s.aside(c[2:]) } })
			}
		})
	case "after-change":
		m.dev.set(func(w *wire) { w.afterCAW = func() { s.aside(c[2:]) } })
	case "state":
		return s.state(m)
	case "write":
		return s.outcome(x.during(func(ctx context.Context) error {
			return m.s.Device().WriteAt(ctx, block512(c[2][0]), dataOff)
		}))
	case "start-write":
		s.started[c[1]] = x.start(func() error { return m.s.Device().WriteAt(s.ctx, block512(c[2][0]), dataOff) })
	case "break", "confirm", "start-break":
		return s.breaks(c, m)
	case "await":
		done := s.started[c[1]]
		delete(s.started, c[1])
		return s.outcome(x.during(func(context.Context) error { return <-done }))
	default:
		x.t.Fatalf("no command %q", c[0])
	}
	return ""
}

// aside is what happens at a moment inside another host's command.
func (s *script) aside(c []string) {
	m := s.host(c[1])
	switch c[0] {
	case "land":
		if err := land(m); err != nil {
			s.x.t.Error(err)
		}
	case "kill":
		m.nexus.Kill()
	default:
		s.x.t.Errorf("no aside %q", c[0])
	}
}

// land lets the newest of what a host has on its way land.
func land(m *machine) error {
	hold := m.nexus.HoldWrites()
	return hold.Land(hold.Pending() - 1)
}

func (s *script) breaks(c []string, m *machine) string {
	victim := s.host(c[2])
	slot, generation := victim.s.Slot(), victim.s.Generation()
	attempt := func(ctx context.Context) error {
		if c[0] == "confirm" {
			return m.s.ConfirmDown(ctx, slot, generation)
		}
		return m.s.Break(ctx, slot, generation)
	}
	if c[0] == "start-break" {
		s.started[c[1]] = s.x.start(func() error { return attempt(s.ctx) })
		return ""
	}
	start := m.clk.Now()
	err := s.x.during(attempt)
	return fmt.Sprintf("after %v: %s", m.clk.Now().Sub(start).Round(100*time.Millisecond), s.outcome(err))
}

func (s *script) outcome(err error) string {
	for _, known := range []error{lease.ErrAlive, lease.ErrUnfenced, lease.ErrLost, lease.ErrNoSlot, lease.ErrNameInUse} {
		if errors.Is(err, known) {
			return known.Error() + "\n"
		}
	}
	if err != nil {
		return err.Error() + "\n"
	}
	return "ok\n"
}

func (s *script) state(m *machine) string {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	switch err := m.s.Device().ReadAt(ctx, make([]byte, 512), dataOff); {
	case m.isLost():
		return "lost\n"
	case err != nil && strings.Contains(err.Error(), "in doubt"):
		return "in doubt\n"
	}
	return "holds its lease\n"
}

func (s *script) slots() string {
	var b strings.Builder
	for slot := range s.x.area.Slots {
		r := s.x.register(slot)
		fmt.Fprintf(&b, "%d: generation %d %v %s", slot, r.Generation, r.Phase, r.HostName)
		if r.Phase == lease.Kill || r.Phase == lease.Done {
			fmt.Fprintf(&b, " by slot %d generation %d", r.BreakerSlot, r.BreakerGeneration)
		}
		fmt.Fprintln(&b)
	}
	return b.String()
}
