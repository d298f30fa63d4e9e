package nbd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"basalt/nbd/wire"
)

const (
	readerBytes = 64 << 10

	// maxDrain is the longest payload of a refused write that is read and thrown
	// away; beyond it the connection is closed.
	maxDrain = 2 * wire.MaxPayload
)

// errEnded: the client ended the connection, or the server is draining it.
var errEnded = errors.New("nbd: connection has ended")

// errAborted: the server gave up waiting for the connection.
var errAborted = errors.New("nbd: connection aborted with requests in flight")

// conn is one client's connection, from accept to close.
//
//	handshake ──go──► transmission ──disconnect, EOF, error, drain──► ended
//	    └──abort, error, drain──► ended
type conn struct {
	server *Server
	nc     net.Conn
	br     *bufio.Reader
	log    *slog.Logger
	done   chan struct{} // closed when the connection has ended, its Export closed

	breakOff context.CancelFunc // ends the context of the handshake

	mu           sync.Mutex // guards draining, transmitting, name
	draining     bool
	transmitting bool
	name         string // of the export, once transmitting

	budget *budget
	writer *writer

	// Of the transmission phase; set by the reader before the first worker starts.
	tx      transmission
	queue   chan *request // as long as the budget: an enqueue never blocks
	busy    atomic.Int32  // requests queued or with a worker
	workers sync.WaitGroup
}

func newConn(s *Server, nc net.Conn, breakOff context.CancelFunc) *conn {
	b := newBudget()
	return &conn{
		server:   s,
		nc:       nc,
		br:       bufio.NewReaderSize(nc, readerBytes),
		log:      s.log.With("peer", nc.RemoteAddr().String()),
		done:     make(chan struct{}),
		breakOff: breakOff,
		budget:   b,
		writer:   &writer{nc: nc, budget: b},
	}
}

// serve runs the connection to its end. ctx is that of the Export's operations,
// handshake that of the Exports'.
func (c *conn) serve(ctx, handshake context.Context) error {
	defer close(c.done)
	defer c.nc.Close()
	err := c.handshake(handshake)
	if c.tx.export == nil {
		return orderly(err)
	}
	if err == nil {
		err = c.transmit(ctx)
	}
	if cerr := c.tx.export.Close(); cerr != nil {
		return errors.Join(orderly(err), fmt.Errorf("nbd: closing export %q: %w", c.name, cerr))
	}
	return orderly(err)
}

// orderly is err, unless that only says that the connection ended as it should.
func orderly(err error) error {
	if errors.Is(err, errEnded) {
		return nil
	}
	return err
}

// transmit reads requests until the connection ends, then waits for those in
// flight and their replies.
func (c *conn) transmit(ctx context.Context) error {
	c.queue = make(chan *request, maxInFlight)
	started := int32(0)
	var err error
	for {
		var r *request
		if r, err = c.readRequest(); err != nil {
			break
		}
		if c.busy.Add(1) > started && started < int32(c.server.opts.Workers) {
			started++
			c.workers.Go(func() { c.work(ctx) })
		}
		c.queue <- r
	}
	close(c.queue)
	c.workers.Wait()
	if cause := c.writer.cause(); cause != nil {
		return cause // the reader has only seen the closed socket
	}
	return err
}

// work executes requests and sends their replies until the queue is closed.
func (c *conn) work(ctx context.Context) {
	for r := range c.queue {
		c.finish(r, c.attempt(ctx, r))
		c.busy.Add(-1)
	}
}

// attempt does the request, unless it was refused or can have no reply any more.
func (c *conn) attempt(ctx context.Context, r *request) error {
	if r.refused != nil {
		return r.refused
	}
	if c.writer.cause() != nil {
		return errEnded
	}
	err := c.tx.execute(ctx, r)
	if err != nil {
		r.errno = errnoOf(err)
		// Clients take ENOTSUP for "never again"; it is kept for a fast
		// write-zeroes that would be slow.
		if r.errno == wire.ENOTSUP && r.Flags&wire.CmdFlagFastZero == 0 {
			r.errno = wire.EINVAL
		}
	}
	return err
}

// finish sends the reply, unless err forbids one.
func (c *conn) finish(r *request, err error) {
	switch {
	case err == nil:
	case isLost(err):
		c.writer.end(err)
	case r.refused == nil:
		c.log.Debug("request failed", "export", c.name, "command", r.Command, "err", err)
	}
	c.tx.reply(r, err)
	c.writer.send(r)
}

// readRequest takes the next request, with its payload, off the socket. It waits
// for room in the budget before it reads the payload.
func (c *conn) readRequest() (*request, error) {
	head, err := c.br.Peek(wire.RequestSize)
	if err != nil {
		return nil, c.ioError(err)
	}
	q, err := wire.DecodeRequest(head)
	if err != nil {
		return nil, err
	}
	if _, err := c.br.Discard(wire.RequestSize); err != nil {
		return nil, c.ioError(err)
	}
	if q.Command == wire.CmdDisconnect {
		return nil, errEnded
	}

	errno, refused := c.tx.refuse(q)
	need := 0
	if refused == nil {
		need = c.tx.bufferBytes(q)
	}
	r := c.budget.acquire(need)
	r.Request, r.errno, r.refused = q, errno, refused
	if q.Command == wire.CmdWrite {
		if err := c.readPayload(r); err != nil {
			c.budget.release(r)
			return nil, c.ioError(err)
		}
	}
	return r, nil
}

// readPayload reads the data of a write, or throws it away if it is refused.
func (c *conn) readPayload(r *request) error {
	switch {
	case r.refused == nil && r.buf != nil:
		_, err := io.ReadFull(c.br, r.buf.data)
		return err
	case r.LenBytes > maxDrain:
		return fmt.Errorf("%w: write of %d bytes", wire.ErrMalformed, r.LenBytes)
	default:
		_, err := io.CopyN(io.Discard, c.br, int64(r.LenBytes))
		return err
	}
}

// ioError tells an ordinary end of the stream from a fault.
func (c *conn) ioError(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.draining || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
		return errEnded
	}
	return fmt.Errorf("nbd: talking to the client: %w", err)
}

// drain makes the connection end once what it has read is done: the reader finds
// its deadline in the past. A handshake is broken off.
func (c *conn) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.draining {
		return
	}
	c.draining = true
	if c.transmitting && c.nc.SetReadDeadline(time.Unix(1, 0)) == nil {
		return
	}
	c.breakOff()
	_ = c.nc.Close() // nothing was promised yet; serve sees the error
}

// enterTransmission makes the connection count for its export. It fails if the
// connection is being drained.
func (c *conn) enterTransmission(name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.draining {
		return errEnded
	}
	c.transmitting = true
	c.name = name
	return nil
}

// uses reports whether the connection is in transmission with the export name.
func (c *conn) uses(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.transmitting && c.name == name
}

// abort makes the connection end without another reply.
func (c *conn) abort() {
	c.drain()
	c.writer.end(errAborted)
}
