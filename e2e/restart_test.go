//go:build e2e

package e2e_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"
)

// model is what a disk must hold, byte for byte: every write that was
// acknowledged, and zeros elsewhere.
type model struct {
	t       *testing.T
	content []byte
	rng     *rand.Rand
	ops     int
}

func newModel(t *testing.T, size int64, seed uint64) *model {
	t.Logf("seed %d", seed)
	return &model{t: t, content: make([]byte, size), rng: rand.New(rand.NewPCG(seed, 1))}
}

// next draws an operation, applies it to the model and gives it in qemu-io's words.
func (m *model) next() string {
	m.ops++
	length := []int{512, 4096, 4096, 4096, 12 << 10, 64 << 10, 256 << 10}[m.rng.IntN(7)]
	off := m.rng.IntN((len(m.content)-length)/512+1) * 512
	switch pattern := m.rng.IntN(255) + 1; m.rng.IntN(16) {
	case 0:
		m.fill(off, length, 0)
		return fmt.Sprintf("write -z %d %d", off, length)
	case 1:
		m.fill(off, length, 0)
		return fmt.Sprintf("write -z -u %d %d", off, length)
	case 2:
		return "flush"
	case 3:
		m.fill(off, length, byte(pattern))
		return fmt.Sprintf("write -f -P %d %d %d", pattern, off, length)
	default:
		m.fill(off, length, byte(pattern))
		return fmt.Sprintf("write -P %d %d %d", pattern, off, length)
	}
}

func (m *model) fill(off, length int, with byte) {
	copy(m.content[off:], bytes.Repeat([]byte{with}, length))
}

// compare demands that got is what was acknowledged.
func (m *model) compare(got []byte) {
	m.t.Helper()
	if len(got) != len(m.content) {
		m.t.Fatalf("the disk has %d bytes, not %d", len(got), len(m.content))
	}
	wrong := 0
	for off := 0; off < len(got); off += 512 {
		if !bytes.Equal(got[off:off+512], m.content[off:off+512]) {
			if wrong++; wrong <= 5 {
				m.t.Errorf("sector at byte %d holds %#x, acknowledged was %#x", off, got[off], m.content[off])
			}
		}
	}
	if wrong > 0 {
		m.t.Errorf("%d of %d sectors are wrong after %d operations", wrong, len(got)/512, m.ops)
	}
}

// read copies an export whole.
func (v *server) read(export string) []byte {
	v.t.Helper()
	file := v.socket + ".copy"
	tool(v.t, "nbdcopy", v.uri(export), file)
	b, err := os.ReadFile(file)
	if err != nil {
		v.t.Fatal(err)
	}
	return b
}

// killRounds kills the server again and again under a client that reconnects, and
// starts a successor, by next, on the same socket: in every other round at any
// moment, else as soon as the client has been told that a write is done.
func killRounds(t *testing.T, m *model, q *qemuIO, v *server, rounds int, next func(round int) *server) *server {
	t.Helper()
	for round := range rounds {
		if m.rng.IntN(2) == 0 {
			killAnyTime(t, m, q, v)
		} else {
			for range m.rng.IntN(100) + 1 {
				q.do("%s", m.next())
			}
			_ = v.cmd.Process.Kill()
			<-v.done
			q.send("%s", m.next())
		}
		v = next(round)
		if said, ok := q.answer(commandTimeout); !ok || !succeeded(said) {
			t.Fatalf("round %d: the client saw the outage: %q", round, said)
		}
	}
	return v
}

// killAnyTime kills the server while the client is at work, and leaves an operation
// of the client unanswered.
func killAnyTime(t *testing.T, m *model, q *qemuIO, v *server) {
	t.Helper()
	delay := time.Duration(m.rng.IntN(400)) * time.Millisecond
	go func() {
		wait(delay)
		_ = v.cmd.Process.Kill()
	}()
	for {
		q.send("%s", m.next())
		select {
		case said, ok := <-q.answers:
			if !ok || !succeeded(said) {
				t.Fatalf("the client saw the outage: %q", said)
			}
		case <-v.done:
			return
		}
	}
}

func TestRestartedServerLosesNothingAcknowledged(t *testing.T) {
	s := newSite(t, "--size", "1G", "--lease", "60s")
	s.ok("disk", "create", s.at("/d"), "--size", "256M")
	v := s.serve()
	q := openDisk(t, v.socket, "d", time.Minute)
	m := newModel(t, 256<<20, rand.Uint64())
	v = killRounds(t, m, q, v, 16, func(round int) *server {
		if round == 5 { // the middle of it is under a snapshot
			s.ok("disk", "snapshot", "create", s.at("/d"), "middle")
		}
		return s.serve()
	})
	m.compare(v.read("d"))
	t.Logf("%d acknowledged operations under 16 killed servers", m.ops)
	v.kill() // unflushed once more
	v = s.serve()
	m.compare(v.read("d"))
	q.close()
	v.stop()
	if u, k := decode[volume](s, "fs", "df", s.lun).UsedBytes, s.disk("/d"); u > k.MappedBytes+k.Snapshots[0].ExclusiveBytes+64<<20 {
		t.Errorf("%d bytes are in use for %d mapped and %d of the snapshot", u, k.MappedBytes, k.Snapshots[0].ExclusiveBytes)
	}
	s.checkClean()
}

// Each successor is another host, which takes the disk over.
func TestClientFollowsItsDiskFromHostToHost(t *testing.T) {
	s := newSite(t, "--size", "512M", "--lease", "60s")
	s.ok("disk", "create", s.at("/d"), "--size", "32M")
	socket := s.path("shared.nbd")
	serve := func(round int) *server {
		v := s.apart(fmt.Sprintf("host%d", round%3)).startServe("--nbd", "unix:"+socket)
		v.says(30*time.Second, " serves on ")
		return v
	}
	v := serve(0)
	q := openDisk(t, socket, "d", time.Minute)
	m := newModel(t, 32<<20, rand.Uint64())
	v = killRounds(t, m, q, v, 9, func(round int) *server { return serve(round + 1) })
	m.compare(v.read("d"))
	q.close()
	v.stop()
	s.checkClean()
	t.Logf("%d acknowledged operations on 3 hosts in turn", m.ops)
}

// SIGTERM drains: what was answered stays, and the lock is free at once.
func TestServerEndsInOrderUnderLoad(t *testing.T) {
	s := newSite(t, "--size", "512M")
	s.ok("disk", "create", s.at("/d"), "--size", "32M")
	v := s.serve()
	q := openDisk(t, v.socket, "d", time.Minute)
	m := newModel(t, 32<<20, 23)
	for range 300 {
		q.do("%s", m.next())
	}
	v.stop()
	if h := s.hosts(); len(h) != 0 {
		t.Errorf("a server that ended in order leaves %+v", h)
	}
	if k := s.disk("/d"); k.LockedBy != "" {
		t.Errorf("a server that ended in order leaves its disk held by %q", k.LockedBy)
	}
	q.send("%s", m.next())
	v = s.serve()
	if said, ok := q.answer(30 * time.Second); !ok || !succeeded(said) {
		t.Errorf("the client after the restart: %q", said)
	}
	m.compare(v.read("d"))
	q.close()
	v.stop()
	s.checkClean()
}
