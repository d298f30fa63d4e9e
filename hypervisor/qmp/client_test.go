package qmp_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"basalt/hypervisor/qmp"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}`

// request is what a client sent.
type request struct {
	Execute   string
	Arguments json.RawMessage
	ID        uint64
}

// peer is the other end of a connection, played by the test.
type peer struct {
	t    *testing.T
	conn net.Conn
	in   *bufio.Reader
}

func (p *peer) say(format string, args ...any) {
	p.t.Helper()
	if _, err := fmt.Fprintf(p.conn, format+"\r\n", args...); err != nil {
		p.t.Error(err)
	}
}

func (p *peer) hear() request {
	p.t.Helper()
	line, err := p.in.ReadBytes('\n')
	if err != nil {
		p.t.Error(err)
		return request{}
	}
	var r request
	if err := json.Unmarshal(line, &r); err != nil {
		p.t.Errorf("client sent %q: %v", line, err)
	}
	return r
}

// connect returns a negotiated client and its peer.
func connect(t *testing.T) (*qmp.Client, *peer) {
	t.Helper()
	ours, theirs := net.Pipe()
	p := &peer{t: t, conn: theirs, in: bufio.NewReader(theirs)}
	t.Cleanup(func() { theirs.Close() })
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.say(greeting)
		r := p.hear()
		if r.Execute != "qmp_capabilities" {
			t.Errorf("first command is %q", r.Execute)
		}
		p.say(`{"return": {}, "id": %d}`, r.ID)
	}()
	c, err := qmp.New(t.Context(), ours)
	if err != nil {
		t.Fatal(err)
	}
	<-done
	t.Cleanup(func() { c.Close() })
	return c, p
}

func TestGreetingTellsTheVersion(t *testing.T) {
	c, _ := connect(t)
	if v := c.Version(); v != (qmp.Version{Major: 7, Minor: 2, Micro: 22, Package: "Debian"}) || !v.AtLeast(7, 2) || v.AtLeast(7, 3) || v.AtLeast(9, 0) {
		t.Errorf("version %+v", v)
	}
}

func TestRepliesOutOfOrderReachTheirCommands(t *testing.T) {
	c, p := connect(t)
	answers := make(chan string, 2)
	var sent sync.WaitGroup
	for _, name := range []string{"first", "second"} {
		sent.Go(func() {
			var answer string
			if err := c.Execute(t.Context(), name, struct {
				N int `json:"n"`
			}{7}, &answer); err != nil {
				t.Error(err)
			}
			answers <- name + " got " + answer
		})
	}
	a, b := p.hear(), p.hear()
	if string(a.Arguments) != `{"n":7}` {
		t.Errorf("arguments %s", a.Arguments)
	}
	p.say(`{"return": %q, "id": %d}`, b.Execute, b.ID)
	p.say(`{"return": %q, "id": %d}`, a.Execute, a.ID)
	sent.Wait()
	for range 2 {
		if got := <-answers; got != "first got first" && got != "second got second" {
			t.Error(got)
		}
	}
}

func TestRefusalIsTyped(t *testing.T) {
	c, p := connect(t)
	go func() {
		r := p.hear()
		p.say(`{"error": {"class": "CommandNotFound", "desc": "The command x has not been found"}, "id": %d}`, r.ID)
	}()
	err := c.Execute(t.Context(), "x", nil, nil)
	refusal, ok := errors.AsType[*qmp.Error](err)
	if !ok || *refusal != (qmp.Error{Command: "x", Class: "CommandNotFound", Desc: "The command x has not been found"}) {
		t.Errorf("error %v", err)
	}
}

func TestCancelledCommandDoesNotDisturbLaterOnes(t *testing.T) {
	c, p := connect(t)
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan request, 1)
	go func() {
		first <- p.hear()
		cancel()
	}()
	if err := c.Execute(ctx, "slow", nil, nil); !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled command: %v", err)
	}
	go func() {
		r := p.hear()
		p.say(`{"return": "late", "id": %d}`, (<-first).ID)
		p.say(`{"return": {"status": "running"}, "id": %d}`, r.ID)
	}()
	if s, err := c.Status(t.Context()); err != nil || s != qmp.StateRunning {
		t.Errorf("next command: %v, %v", s, err)
	}
}

func TestCommandToAPeerThatDoesNotReadObeysItsContext(t *testing.T) {
	c, _ := connect(t) // a net.Pipe has no buffer
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := c.Execute(ctx, "x", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
}

func TestLostConnectionFailsEveryWaiter(t *testing.T) {
	c, p := connect(t)
	const waiters = 5
	failed := make(chan error, waiters)
	for range waiters {
		go func() { failed <- c.Execute(t.Context(), "x", nil, nil) }()
	}
	for range waiters {
		p.hear()
	}
	p.conn.Close()
	for range waiters {
		if err := <-failed; !errors.Is(err, qmp.ErrClosed) {
			t.Errorf("waiter: %v", err)
		}
	}
	<-c.Done()
	if err := c.Execute(t.Context(), "x", nil, nil); !errors.Is(err, qmp.ErrClosed) || !errors.Is(err, io.EOF) {
		t.Errorf("later command: %v; want ErrClosed and its cause", err)
	}
	if _, open := <-c.Events(); open {
		t.Error("the events go on")
	}
}

func TestUnreadEventsAreDroppedOldestFirstAndCounted(t *testing.T) {
	c, p := connect(t)
	const sent = 600
	go func() {
		for i := range sent {
			p.say(`{"timestamp": {"seconds": 1, "microseconds": 5}, "event": "E%d", "data": {"n": %d}}`, i, i)
		}
		r := p.hear()
		p.say(`{"return": {"status": "paused"}, "id": %d}`, r.ID)
	}()
	// The reply comes behind the events, so nobody read them yet.
	if s, err := c.Status(t.Context()); err != nil || s != qmp.StatePaused {
		t.Fatalf("status behind unread events: %v, %v", s, err)
	}
	p.conn.Close()
	var names []string
	lost := 0
	for e := range c.Events() {
		names = append(names, e.Name)
		lost += e.Lost
		if !e.At.Equal(time.Unix(1, 5000)) {
			t.Fatalf("event at %v", e.At)
		}
	}
	if n := len(names) + lost; n != sent || names[len(names)-1] != fmt.Sprintf("E%d", sent-1) {
		t.Errorf("%d read, %d lost, last %s", len(names), lost, names[len(names)-1])
	}
}

func TestNonsenseEndsTheConnection(t *testing.T) {
	for name, c := range map[string]struct {
		say  string
		want error
	}{
		"not JSON":         {"hello", qmp.ErrProtocol},
		"no kind":          {`{"id": 1}`, qmp.ErrProtocol},
		"two kinds":        {`{"return": {}, "event": "X"}`, qmp.ErrProtocol},
		"second greeting":  {greeting, qmp.ErrProtocol},
		"unsent id":        {`{"return": {}, "id": 99}`, qmp.ErrProtocol},
		"reply without id": {`{"error": {"class": "GenericError", "desc": "JSON parse error"}}`, qmp.ErrProtocol},
		"id of a string":   {`{"return": {}, "id": "1"}`, qmp.ErrProtocol},
		"too long":         {`{"event": "` + strings.Repeat("x", qmp.MaxMessageBytes) + `"}`, qmp.ErrTooLong},
	} {
		t.Run(name, func(t *testing.T) {
			client, p := connect(t)
			go fmt.Fprintf(p.conn, "%s\r\n", c.say)
			<-client.Done()
			if err := client.Cont(t.Context()); !errors.Is(err, qmp.ErrClosed) || !errors.Is(err, c.want) {
				t.Errorf("error %.200v; want %v", err, c.want)
			}
		})
	}
}

func TestPeerThatDoesNotGreet(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := qmp.New(ctx, ours); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if _, err := theirs.Write([]byte("x")); err == nil {
		t.Error("the connection stays open after New failed")
	}
}
