package nbd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"basalt/internal/clock"
)

// ErrClosed: the server was shut down.
var ErrClosed = errors.New("nbd: server is closed")

// Options tune a Server. The zero value is ready for use.
type Options struct {
	MaxConnections   int           // of all listeners; further ones are closed at once; default 1024
	Workers          int           // most requests of one connection that the Export sees at once, 1..128; default 16
	HandshakeTimeout time.Duration // longest time for one message of the handshake; default 10s
}

func (o Options) withDefaults() (Options, error) {
	if o.MaxConnections == 0 {
		o.MaxConnections = 1024
	}
	if o.Workers == 0 {
		o.Workers = 16
	}
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = 10 * time.Second
	}
	if o.MaxConnections < 0 || o.Workers < 0 || o.Workers > maxInFlight || o.HandshakeTimeout < 0 {
		return Options{}, fmt.Errorf("nbd: options out of range: %+v", o)
	}
	return o, nil
}

// Server serves Exports on any number of listeners and connections.
type Server struct {
	exports Exports
	clk     clock.Clock
	log     *slog.Logger
	opts    Options

	mu        sync.Mutex // guards conns, listeners, closed
	conns     map[*conn]context.CancelFunc
	listeners map[net.Listener]struct{}
	closed    bool
	active    sync.WaitGroup // connections; added to under mu while not closed
}

// New returns a server; it listens to nothing yet.
func New(exports Exports, clk clock.Clock, log *slog.Logger, opts Options) (*Server, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	return &Server{
		exports:   exports,
		clk:       clk,
		log:       log,
		opts:      opts,
		conns:     make(map[*conn]context.CancelFunc),
		listeners: make(map[net.Listener]struct{}),
	}, nil
}

// acceptPause is the time between attempts while the host is out of files or
// memory for another connection.
const acceptPause = 100 * time.Millisecond

// Serve accepts connections from l until ctx ends, which drains the connections
// that it accepted, or until Shutdown. It closes l, waits for its connections
// and returns nil, or the error that ended accepting; that is also logged, for the
// connections live on.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	if err := s.addListener(l); err != nil {
		return errors.Join(err, l.Close())
	}
	stop := context.AfterFunc(ctx, func() { s.dropListener(l) })
	var serving sync.WaitGroup
	err := s.accept(ctx, l, &serving)
	stop()
	s.dropListener(l)
	serving.Wait()
	return err
}

func (s *Server) accept(ctx context.Context, l net.Listener, serving *sync.WaitGroup) error {
	for {
		nc, err := l.Accept()
		switch {
		case err == nil:
			serving.Go(func() {
				if err := s.ServeConn(ctx, nc); err != nil {
					s.logEnd(nc, err)
				}
			})
		case !s.listening(l):
			return nil
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOBUFS),
			errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ECONNABORTED):
			s.log.Warn("cannot accept a connection", "listener", l.Addr().String(), "err", err)
			s.pause(ctx)
		default:
			err = fmt.Errorf("nbd: accepting on %s: %w", l.Addr(), err)
			s.log.Error("no more connections are accepted", "err", err) // Serve returns only after the last has ended
			return err
		}
	}
}

func (s *Server) pause(ctx context.Context) {
	t := s.clk.NewTimer(acceptPause)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func (s *Server) logEnd(nc net.Conn, err error) {
	level := slog.LevelInfo
	if isLost(err) {
		level = slog.LevelWarn
	}
	s.log.Log(context.Background(), level, "connection ended", "peer", nc.RemoteAddr().String(), "err", err)
}

// ServeConn serves one connection to its end and closes it. When ctx ends the
// connection is drained: what was received whole is done and answered. A client
// that leaves in order is no error. ErrClosed: the server takes no connections.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) error {
	// Draining lets requests run to their end, so they do not see ctx end.
	opCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	handshake, breakOff := context.WithCancel(opCtx)
	defer breakOff()
	c := newConn(s, nc, breakOff)
	if err := s.addConn(c, cancel); err != nil {
		return errors.Join(err, nc.Close())
	}
	defer s.removeConn(c)
	stop := context.AfterFunc(ctx, c.drain)
	defer stop()
	return c.serve(opCtx, handshake)
}

// Shutdown stops all listeners and drains all connections: no request is read any
// more, those in flight are done and answered, then the sockets are closed, so
// that clients may send what had no answer to a successor. When ctx ends first,
// the rest is aborted: contexts are cancelled and nothing more is answered.
// Shutdown returns after the last connection has ended, with ctx's error if any
// was aborted; that takes as long as the Exports' methods take to obey.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	for l := range s.listeners {
		delete(s.listeners, l)
		_ = l.Close() // Accept reports it
	}
	for c := range s.conns {
		c.drain()
	}
	s.mu.Unlock()

	ended := make(chan struct{})
	go func() {
		s.active.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	for c, cancel := range s.conns {
		c.abort() // first, so that no cancelled request is answered by an error
		cancel()
	}
	s.mu.Unlock()
	<-ended
	return ctx.Err()
}

func (s *Server) addListener(l net.Listener) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	s.listeners[l] = struct{}{}
	return nil
}

// dropListener closes l unless that has been done.
func (s *Server) dropListener(l net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.listeners[l]; ok {
		delete(s.listeners, l)
		_ = l.Close() // Accept reports it
	}
}

func (s *Server) listening(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.listeners[l]
	return ok
}

// errTooMany: the connection is one above Options.MaxConnections.
var errTooMany = errors.New("nbd: too many connections")

func (s *Server) addConn(c *conn, cancel context.CancelFunc) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	if len(s.conns) >= s.opts.MaxConnections {
		return errTooMany
	}
	s.conns[c] = cancel
	s.active.Add(1)
	return nil
}

func (s *Server) removeConn(c *conn) {
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
	s.active.Done()
}
