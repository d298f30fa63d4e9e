package nbd

import (
	"context"
	"errors"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// errPredecessor: a client cannot have the export while requests of a connection
// that has ended before are still being executed.
var errPredecessor = errors.New("nbd: requests of an earlier connection are still in progress")

// awaitGone waits until all connections to the export name have ended whose
// client has gone. Such a connection may still have requests in progress, in its
// queue, or unread in its socket. Its client may send them again through the new
// connection self, and later ones on top; the old ones must not land after those.
// When a client has closed one socket before it opens the next, as any that
// reconnects has, the kernel tells here that the old one is gone. Over TCP that
// news may be late or lost: whoever exports over TCP should know that a client
// which reconnects through a broken network may see its own older write.
//
// It gives up, and the client may try again, after the handshake timeout.
func (s *Server) awaitGone(ctx context.Context, self *conn, name string) error {
	t := s.clk.NewTimer(s.opts.HandshakeTimeout)
	defer t.Stop()
	for _, c := range s.gone(self, name) {
		select {
		case <-c.done:
		case <-t.C:
			return errPredecessor
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// gone lists the connections to the export name, other than self, whose client
// has gone.
func (s *Server) gone(self *conn, name string) []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*conn
	for c := range s.conns {
		if c != self && c.uses(name) && peerGone(c.nc) {
			out = append(out, c)
		}
	}
	return out
}

// peerGone reports whether the peer of a socket will send nothing more than what
// the kernel already holds. It is false for what is not a socket.
func peerGone(nc net.Conn) bool {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return true // closed by us
	}
	gone := false
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, perr := unix.Poll(p, 0)
		for errors.Is(perr, unix.EINTR) {
			n, perr = unix.Poll(p, 0)
		}
		gone = n > 0 && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
	})
	return gone || err != nil
}
