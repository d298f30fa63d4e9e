//go:build e2e

package e2e_test

import (
	"bufio"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// qemuIO is a qemu-io that stays: a client that sends requests again on a new
// connection when its server comes back, as a guest's QEMU does.
type qemuIO struct {
	t       *testing.T
	cmd     *exec.Cmd
	in      io.WriteCloser
	answers chan string // one per command; closed when qemu-io has ended
}

const qemuIOPrompt = "qemu-io> "

// openDisk connects a qemu-io to an export. It waits for a server that is away
// for as long as reconnect says.
func openDisk(t *testing.T, socket, export string, reconnect time.Duration) *qemuIO {
	t.Helper()
	q := &qemuIO{t: t, answers: make(chan string)}
	opts := fmt.Sprintf("driver=nbd,server.type=unix,server.path=%s,export=%s,reconnect-delay=%d,cache.direct=on,discard=unmap",
		socket, export, int(reconnect.Seconds()))
	q.cmd = exec.Command(needTool(t, "qemu-io"), "--image-opts", opts)
	q.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var err error
	if q.in, err = q.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := q.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	q.cmd.Stderr = q.cmd.Stdout
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // see runToItsEnd
		defer runtime.UnlockOSThread()
		err := q.cmd.Start()
		started <- err
		if err == nil {
			q.read(out)
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = q.cmd.Process.Kill() // it may have ended
		for range q.answers {    // until the reader has ended
		}
		_ = q.cmd.Wait() // ends as killed
	})
	if said, ok := q.answer(30 * time.Second); !ok || said != "" {
		t.Fatalf("qemu-io does not open %s: %q", export, said)
	}
	return q
}

// read turns the output into answers: what stands before each prompt.
func (q *qemuIO) read(r io.Reader) {
	defer close(q.answers)
	br := bufio.NewReader(r)
	var b strings.Builder
	for {
		c, err := br.ReadByte()
		if err != nil {
			if rest := b.String(); rest != "" {
				q.answers <- rest
			}
			return
		}
		b.WriteByte(c)
		if text, ok := strings.CutSuffix(b.String(), qemuIOPrompt); ok {
			q.answers <- text
			b.Reset()
		}
	}
}

// answer waits for the next answer; false: none in time.
func (q *qemuIO) answer(limit time.Duration) (string, bool) {
	done := make(chan struct{})
	timer := time.AfterFunc(limit, func() { close(done) })
	defer timer.Stop()
	select {
	case said, ok := <-q.answers:
		return said, ok
	case <-done:
		return "", false
	}
}

// send gives a command without waiting for its answer.
func (q *qemuIO) send(format string, args ...any) {
	q.t.Helper()
	if _, err := fmt.Fprintf(q.in, format+"\n", args...); err != nil {
		q.t.Fatalf("qemu-io: %v", err)
	}
}

// try gives a command and returns what qemu-io answers in time.
func (q *qemuIO) try(limit time.Duration, format string, args ...any) (string, bool) {
	q.t.Helper()
	q.send(format, args...)
	return q.answer(limit)
}

// do gives a command that must succeed.
func (q *qemuIO) do(format string, args ...any) {
	q.t.Helper()
	said, ok := q.try(commandTimeout, format, args...)
	if !ok || !succeeded(said) {
		q.t.Fatalf("qemu-io %s: %q (answered: %v)", fmt.Sprintf(format, args...), said, ok)
	}
}

// succeeded judges an answer: qemu-io reports failures in words only.
func succeeded(said string) bool {
	return !strings.Contains(said, "fail") && !strings.Contains(said, "rror") && !strings.Contains(said, "invalid")
}

// close ends the client in order; qemu-io flushes then.
func (q *qemuIO) close() {
	q.t.Helper()
	if _, err := io.WriteString(q.in, "quit\n"); err != nil {
		q.t.Fatalf("qemu-io: %v", err)
	}
	q.in.Close()
	if said, ok := q.answer(30 * time.Second); ok {
		q.t.Fatalf("qemu-io quit: %q", said)
	}
}
