//go:build e2e

package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"basalt/internal/clock"
)

const (
	hammerTime  = 20 * time.Second
	hammerFiles = 16 // a host keeps at most so many
	killOneIn   = 3  // commands, if it takes long enough
	killWithin  = 50 * time.Millisecond
)

// hammer is one host at work on a volume, some of whose commands are killed. It
// remembers what was acknowledged.
type hammer struct {
	*site
	rng    *rand.Rand
	files  map[string]uint64 // path → seed of its content
	next   int
	tally  map[string]int
	killed int
}

// errKilled: the command was killed, and may have done its work or not.
var errKilled = errors.New("killed")

// do runs a command, perhaps not to its end.
func (h *hammer) do(stdin []byte, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	if h.rng.IntN(killOneIn) == 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, time.Duration(h.rng.Int64N(int64(killWithin))))
		defer stop()
	}
	r, err := h.attempt(h.command(ctx, args...), stdin)
	switch {
	case r.code == -1 && ctx.Err() != nil:
		h.killed++
		return errKilled
	case err != nil && ctx.Err() != nil: // before it had started
		return errKilled
	case err != nil || r.code != 0:
		return fmt.Errorf("host %s: basalt %q: exit code %d, %w: %s", h.host, args, r.code, errors.Join(err, errFailed), r.err)
	}
	h.tally[args[0]+" "+args[1]]++
	return nil
}

var errFailed = errors.New("failed")

// see reads a file without killing anything; false: there is none.
func (h *hammer) see(path string) (content string, there bool, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	r, err := h.attempt(h.command(ctx, "fs", "cat", h.at(path)), nil)
	switch {
	case err == nil && r.code == 0:
		return r.out, true, nil
	case err == nil && r.code == 3:
		return "", false, nil
	}
	return "", false, fmt.Errorf("host %s: fs cat %s: exit code %d, %w: %s", h.host, path, r.code, errors.Join(err, errFailed), r.err)
}

// content is what the file of a seed holds.
func content(seed uint64) string {
	return string(noise(seed, int(seed*7919%(3<<20))))
}

// remove removes for certain.
func (h *hammer) remove(path string, more ...string) error {
	args := append([]string{"fs", "rm", h.at(path), "--yes"}, more...)
	for {
		err := h.do(nil, args...)
		if errors.Is(err, errKilled) {
			continue
		}
		if err != nil && strings.Contains(err.Error(), "exit code 3") {
			return nil // a killed one had done it
		}
		return err
	}
}

func (h *hammer) put() error {
	h.next++
	seed := uint64(h.next)*64 + uint64(h.host[0])
	path := fmt.Sprintf("/%s/f%d", h.host, h.next)
	err := h.do([]byte(content(seed)), "fs", "put", "-", h.at(path))
	if err == nil {
		h.files[path] = seed
		return nil
	}
	if !errors.Is(err, errKilled) {
		return err
	}
	got, there, err := h.see(path)
	if err != nil || !there {
		return err
	}
	if got != "" && got != content(seed) {
		return fmt.Errorf("%s, of a killed put, holds %d other bytes", path, len(got))
	}
	return h.remove(path)
}

// any draws one of the acknowledged files.
func (h *hammer) any() string {
	n := h.rng.IntN(len(h.files))
	for path := range h.files {
		if n--; n < 0 {
			return path
		}
	}
	panic("unreachable")
}

// holds demands that a path holds an acknowledged file.
func (h *hammer) holds(path string, seed uint64) error {
	got, there, err := h.see(path)
	if err == nil && (!there || got != content(seed)) {
		err = fmt.Errorf("%s: there: %v, %d bytes, want the %d acknowledged ones", path, there, len(got), len(content(seed)))
	}
	return err
}

func (h *hammer) rm() error {
	path := h.any()
	seed := h.files[path]
	delete(h.files, path)
	err := h.do(nil, "fs", "rm", h.at(path), "--yes")
	if !errors.Is(err, errKilled) {
		return err
	}
	got, there, err := h.see(path)
	if there {
		if got != content(seed) {
			return fmt.Errorf("%s, of a killed rm, holds %d other bytes", path, len(got))
		}
		h.files[path] = seed
	}
	return err
}

// mv moves a file between the host's folder and one that all share.
func (h *hammer) mv() error {
	from := h.any()
	seed := h.files[from]
	h.next++
	to := fmt.Sprintf("/shared/%s%d", h.host, h.next)
	if strings.HasPrefix(from, "/shared") {
		to = fmt.Sprintf("/%s/m%d", h.host, h.next)
	}
	err := h.do(nil, "fs", "mv", h.at(from), h.at(to))
	if err == nil {
		delete(h.files, from)
		h.files[to] = seed
		return nil
	}
	if !errors.Is(err, errKilled) {
		return err
	}
	_, old, err1 := h.see(from)
	_, moved, err2 := h.see(to)
	switch err := errors.Join(err1, err2); {
	case err != nil:
		return err
	case old == moved:
		return fmt.Errorf("after a killed mv %s is there: %v, %s: %v", from, old, to, moved)
	case moved:
		delete(h.files, from)
		h.files[to] = seed
		return h.holds(to, seed)
	}
	return h.holds(from, seed)
}

func (h *hammer) folder() error {
	path := fmt.Sprintf("/shared/dir-%s", h.host)
	err := h.do(nil, "fs", "mkdir", h.at(path))
	if err != nil && !errors.Is(err, errKilled) {
		return err
	}
	return h.remove(path, "-r")
}

// again repeats a command that is killed until it has ended by itself; done are
// words of the failure that says that a killed one had been through.
func (h *hammer) again(done string, args ...string) error {
	for {
		err := h.do(nil, args...)
		if errors.Is(err, errKilled) {
			continue
		}
		if err != nil && done != "" && strings.Contains(err.Error(), done) {
			return nil
		}
		return err
	}
}

// io has qemu-io carry out commands on an export through a server of this host's
// own, which is then killed.
func (h *hammer) io(export string, commands ...string) error {
	socket := h.path(h.host + ".hammer")
	cmd := h.command(context.Background(), "disk", "serve", h.lun, "--nbd", "unix:"+socket)
	v := start(h.t, "server "+h.host, cmd)
	defer func() {
		_ = cmd.Process.Kill()
		<-v.done
	}()
	clk := clock.System{}
	for end := clk.Now().Add(commandTimeout); !strings.Contains(strings.Join(v.said(), "\n"), " serves on "); wait(pause) {
		select {
		case <-v.done:
			return fmt.Errorf("server %s has ended: %w: %q", h.host, errFailed, v.said())
		default:
		}
		if clk.Now() > end {
			return fmt.Errorf("server %s does not serve: %w", h.host, errFailed)
		}
	}
	args := []string{"-f", "raw", "nbd+unix:///" + export + "?socket=" + socket}
	if strings.Contains(export, "@") {
		args = append(args, "-r")
	}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out, err := tryTool(h.t, "qemu-io", args...)
	if err != nil || !succeeded(out) {
		return fmt.Errorf("host %s: qemu-io %q: %w: %s", h.host, commands, errors.Join(err, errFailed), out)
	}
	h.tally["qemu-io"]++
	return nil
}

// cycle is a disk's life: written through a server that is killed, snapshotted,
// overwritten, cloned, read back, removed.
func (h *hammer) cycle() error {
	h.next++
	d, c := fmt.Sprintf("/%s/disk%d", h.host, h.next), fmt.Sprintf("/%s/clone%d", h.host, h.next)
	p := h.rng.IntN(200) + 1
	for _, step := range []func() error{
		func() error { return h.again("exists", "disk", "create", h.at(d), "--size", "32M") },
		func() error { return h.io(d[1:], fmt.Sprintf("write -P %d 0 4M", p), "write -P 9 30M 64k") },
		func() error { return h.again("exists", "disk", "snapshot", "create", h.at(d), "s") },
		func() error { return h.io(d[1:], fmt.Sprintf("write -P %d 1M 64k", p+1), "discard 30M 64k") },
		func() error { return h.again("exists", "disk", "clone", h.at(d+"@s"), h.at(c)) },
		func() error {
			return h.io(d[1:], fmt.Sprintf("read -P %d 0 1M", p), fmt.Sprintf("read -P %d 1M 64k", p+1), "read -P 0 30M 64k", fmt.Sprintf("read -P %d 2M 2M", p))
		},
		func() error {
			return h.io(c[1:], fmt.Sprintf("read -P %d 0 4M", p), "read -P 9 30M 64k", "write -P 8 0 128k", "read -P 8 0 128k")
		},
		func() error { return h.io(d[1:]+"@s", fmt.Sprintf("read -P %d 0 4M", p), "read -P 9 30M 64k") },
		func() error { return h.remove(c) },
		func() error { return h.again("no such snapshot", "disk", "snapshot", "rm", h.at(d), "s", "--yes") },
		func() error { return h.remove(d) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	h.tally["disk cycles"]++
	return nil
}

// work goes on until the time is over.
func (h *hammer) work(end clock.Instant) error {
	for (clock.System{}).Now() < end {
		var err error
		switch n := h.rng.IntN(20); {
		case n < 1:
			err = h.cycle()
		case n < 3:
			err = h.folder()
		case len(h.files) < 2 || n < 9 && len(h.files) < hammerFiles:
			err = h.put()
		case n < 13:
			err = h.mv()
		case n < 16:
			err = h.rm()
		default:
			path := h.any()
			err = h.holds(path, h.files[path])
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Four hosts work on one volume, one of them a server under a client all the time;
// commands and servers are killed at random. What was acknowledged is there, and
// the volume is sound.
func TestFourHostsHammerOneVolume(t *testing.T) {
	seed := rand.Uint64() // newModel logs it; the processes' timing follows from no seed
	s := newSite(t, "--size", "2G", "--lease", "8s")
	s.ok("fs", "mkdir", s.at("/shared"))
	s.ok("disk", "create", s.at("/long"), "--size", "32M")
	end := clock.System{}.Now().Add(hammerTime)

	var hosts []*hammer
	var errs [3]error
	var all sync.WaitGroup
	for i, name := range []string{"b", "c", "d"} {
		at := s.apart(name)
		if i == 0 {
			at = s.as(name) // on the server's machine
		}
		h := &hammer{site: at, rng: rand.New(rand.NewPCG(seed, uint64(i))), files: map[string]uint64{}, tally: map[string]int{}}
		s.ok("fs", "mkdir", s.at("/"+name))
		hosts = append(hosts, h)
		all.Go(func() { errs[i] = h.work(end) })
	}
	v := s.serve("/long")
	q := openDisk(t, v.socket, "long", time.Minute)
	m := newModel(t, 32<<20, seed)
	rounds := 0
	for ; (clock.System{}).Now() < end; rounds++ {
		v = killRounds(t, m, q, v, 1, func(int) *server { return s.serve("/long") })
		for calm := (clock.System{}).Now().Add(2 * time.Second); (clock.System{}).Now() < min(calm, end); {
			q.do("%s", m.next())
		}
	}
	all.Wait()
	if err := errors.Join(errs[:]...); err != nil {
		t.Error(err)
	}
	m.compare(v.read("long"))
	s.as("z").checkClean() // under the server
	q.close()
	v.kill()

	fresh := s.apart("fresh")
	files := 0
	for _, h := range hosts {
		for path, seed := range h.files {
			got := fresh.ok("fs", "cat", fresh.at(path))
			if got != content(seed) {
				t.Errorf("%s holds %d other bytes", path, len(got))
			}
			files++
		}
		t.Logf("host %s: %d killed; done: %v", h.host, h.killed, h.tally)
	}
	if n := len(decode[items[entry]](fresh, "fs", "ls", fresh.at("/shared")).Items); n > files {
		t.Errorf("%d entries in /shared, of %d files in all", n, files)
	}
	fresh.checkClean()
	if out := fresh.ok("fs", "check", fresh.lun); strings.Contains(out, "leak") {
		t.Logf("space that the killed left: %s", out)
	}
	t.Logf("server: %d times killed under %d operations; %d files read back", rounds, m.ops, files)
}

// Many hosts at once in one folder: every acknowledged name is there once.
func TestManyHostsCreateInOneFolder(t *testing.T) {
	s := newSite(t, "--size", "256M")
	const hosts, each = 8, 6
	var all sync.WaitGroup
	var mu sync.Mutex // guards failed
	var failed error
	for i := range hosts {
		at := s.as(fmt.Sprintf("host%d", i))
		all.Go(func() {
			for j := range each {
				path := fmt.Sprintf("/%d-%d", i, j)
				ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
				r, err := at.attempt(at.command(ctx, "fs", "put", "-", at.at(path)), []byte(path))
				cancel()
				if err != nil || r.code != 0 {
					mu.Lock()
					failed = errors.Join(failed, err, fmt.Errorf("put %s: exit code %d: %s", path, r.code, r.err))
					mu.Unlock()
				}
			}
		})
	}
	all.Wait()
	if failed != nil {
		t.Fatal(failed)
	}
	list := decode[items[entry]](s, "fs", "ls", s.lun).Items
	if len(list) != hosts*each {
		t.Errorf("%d of %d files are listed", len(list), hosts*each)
	}
	for _, e := range list {
		if got := s.ok("fs", "cat", s.at("/"+e.Name)); got != "/"+e.Name {
			t.Errorf("%s holds %q", e.Name, got)
		}
	}
	s.checkClean()
}

// A SIGINT leaves nothing half done behind.
func TestInterruptedPutLeavesNothing(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--size", "512M", "--lease", "60s")
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := s.command(t.Context(), "fs", "put", "-", s.at("/f"))
	cmd.Stdin = in
	p := start(t, "put", cmd)
	in.Close()
	if _, err := out.Write(bytes.Repeat([]byte{1}, 3<<20)); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "put has written and waits for more", func() bool {
		return decode[volume](s, "fs", "df", s.lun).UsedBytes > 0
	})
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if code := p.ends(20 * time.Second); code != 1 {
		t.Errorf("exit code %d: %q", code, p.said())
	}
	if got := s.names("/"); got != "" {
		t.Errorf("left over: %q", got)
	}
	if h := s.hosts(); len(h) != 0 {
		t.Errorf("the slot was not given back: %+v", h)
	}
	s.checkClean()
}
