package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// ErrClosed: the connection is gone. The error wraps the cause.
var ErrClosed = errors.New("qmp: connection is closed")

// maxEvents is how many unread events wait. At the bound the oldest is dropped
// and counted in the Lost of the one that took its place.
const maxEvents = 256

// Client is one QMP connection. Its methods may be called at the same time.
type Client struct {
	conn    net.Conn
	version Version
	events  chan Event
	done    chan struct{} // closed after the reader ended; publishes err
	err     error

	sendLock chan struct{} // holds one token; a channel so that waiting obeys a context

	mu      sync.Mutex // guards lastID, waiting, closed
	lastID  uint64
	waiting map[uint64]chan<- Message
	closed  bool
}

// Dial connects to the unix socket at path and negotiates. QEMU serves one
// connection per monitor: while another one is open, Dial waits for ctx.
func Dial(ctx context.Context, path string) (*Client, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("qmp: %w", err)
	}
	return New(ctx, conn)
}

// New negotiates on conn, which it owns from here on: it is closed when New
// fails.
func New(ctx context.Context, conn net.Conn) (*Client, error) {
	c := &Client{
		conn:     conn,
		events:   make(chan Event, maxEvents),
		done:     make(chan struct{}),
		sendLock: make(chan struct{}, 1),
		waiting:  map[uint64]chan<- Message{},
	}
	greeting := make(chan Version, 1)
	go c.read(greeting)
	select {
	case c.version = <-greeting:
	case <-c.done:
		return nil, c.closeError()
	case <-ctx.Done():
		return nil, errors.Join(fmt.Errorf("qmp: no greeting: %w", ctx.Err()), c.Close())
	}
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// Version is that of the QEMU at the other end.
func (c *Client) Version() Version { return c.version }

// Events delivers what happens from the first event on; it is closed when the
// connection ends.
func (c *Client) Events() <-chan Event { return c.events }

// Done is closed when the connection ended, by either side.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the connection and waits for the reader. Waiting commands fail.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.done
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (c *Client) closeError() error { return fmt.Errorf("%w: %w", ErrClosed, c.err) }

type command struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
	ID        uint64 `json:"id"`
}

// Execute runs a command and waits for its reply. args is marshalled to the
// command's arguments object, nil for none; the reply is unmarshalled into
// result unless that is nil. A refusal is an *Error. When ctx ends first the
// command may still be carried out.
func (c *Client) Execute(ctx context.Context, name string, args, result any) error {
	id, reply := c.expect()
	if id == 0 {
		return c.closeError()
	}
	defer c.forget(id)
	b, err := json.Marshal(command{Execute: name, Arguments: args, ID: id})
	if err != nil {
		return fmt.Errorf("qmp: %s: %w", name, err)
	}
	if err := c.send(ctx, append(b, '\n')); err != nil {
		return fmt.Errorf("qmp: %s: %w", name, err)
	}
	var m Message
	select {
	case m = <-reply:
	case <-ctx.Done():
		return fmt.Errorf("qmp: %s: %w", name, ctx.Err())
	case <-c.done:
		// The reply may have been the last thing read.
		select {
		case m = <-reply:
		default:
			return fmt.Errorf("qmp: %s: %w", name, c.closeError())
		}
	}
	if m.Refusal != nil {
		m.Refusal.Command = name
		return m.Refusal
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, result); err != nil {
		return fmt.Errorf("qmp: reply to %s: %w", name, err)
	}
	return nil
}

// expect registers a command and returns its id, or 0 after the connection
// ended.
func (c *Client) expect() (uint64, <-chan Message) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		<-c.done
		return 0, nil
	}
	defer c.mu.Unlock()
	c.lastID++
	reply := make(chan Message, 1)
	c.waiting[c.lastID] = reply
	return c.lastID, reply
}

func (c *Client) forget(id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, id)
}

// send writes one message. A write cut short leaves half a message on the
// stream, so it ends the connection.
func (c *Client) send(ctx context.Context, b []byte) error {
	select {
	case c.sendLock <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	case <-c.done:
		return c.closeError()
	}
	defer func() { <-c.sendLock }()
	// A deadline in the past makes a blocked Write return.
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetWriteDeadline(time.Unix(1, 0)) })
	n, err := c.conn.Write(b)
	if !stop() && n < len(b) {
		return errors.Join(ctx.Err(), c.conn.Close())
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrClosed, errors.Join(err, c.conn.Close()))
	}
	return nil
}

// read is the connection's only reader. It ends when the stream does.
func (c *Client) read(greeting chan<- Version) {
	err := c.dispatchAll(greeting)
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.err = errors.Join(err, ignoreClosed(c.conn.Close()))
	close(c.done)
	close(c.events)
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (c *Client) dispatchAll(greeting chan<- Version) error {
	d := NewDecoder(c.conn)
	greeted := false
	for {
		m, err := d.Next()
		switch {
		case err != nil:
			return err
		case m.Greeting != nil && !greeted:
			greeted = true
			greeting <- *m.Greeting
		case m.Greeting != nil || !greeted:
			return fmt.Errorf("%w: a greeting that is not the first message", ErrProtocol)
		case m.Event != nil:
			c.deliver(*m.Event)
		default:
			if err := c.answer(m); err != nil {
				return err
			}
		}
	}
}

// deliver queues an event, in place of the oldest when there is no room.
func (c *Client) deliver(e Event) {
	for {
		select {
		case c.events <- e:
			return
		default:
		}
		select {
		case old := <-c.events:
			e.Lost += 1 + old.Lost
		default:
		}
	}
}

func (c *Client) answer(m Message) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if m.ID == 0 || m.ID > c.lastID {
		return fmt.Errorf("%w: a reply to command %d, which was not sent", ErrProtocol, m.ID)
	}
	if reply, ok := c.waiting[m.ID]; ok {
		delete(c.waiting, m.ID)
		reply <- m // has room: an id is answered once
	}
	return nil
}
