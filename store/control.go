package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"basalt/datastore"
)

// Request is one command to the host that holds a disk, over its control socket:
// one JSON object each way, then the connection ends.
type Request struct {
	Verb string `json:"verb"`
	Path string `json:"path"`
	Name string `json:"name,omitempty"` // of a snapshot
	To   string `json:"to,omitempty"`   // a clone's path
}

// The verbs.
const (
	VerbInfo           = "disk.info"
	VerbRemove         = "disk.rm"
	VerbClone          = "disk.clone"
	VerbSnapshotCreate = "snapshot.create"
	VerbSnapshotRemove = "snapshot.rm"
	VerbExport         = "disk.export" // where the disk or snapshot can be read by NBD
	VerbPing           = "ping"        // nothing but an answer
)

// Response is the answer to a Request.
type Response struct {
	Disk  *datastore.DiskInfo `json:"disk,omitempty"`
	NBD   string              `json:"nbd,omitempty"` // an NBD URI
	Error *RemoteError        `json:"error,omitempty"`
}

// RemoteError is an error that the holder of a disk reported.
type RemoteError struct {
	Code    int    `json:"code"` // exit code of the command contract
	Message string `json:"message"`
}

func (e *RemoteError) Error() string { return e.Message }

// maxRequest bounds a message on the control socket, in bytes.
const maxRequest = 1 << 20

// controlTimeout bounds how long a peer may take to send its request or take the
// response.
const controlTimeout = 30 * time.Second

// pingTimeout is how long a host may take to answer VerbPing.
const pingTimeout = 5 * time.Second

// errSilent: somebody listens on the control socket and does not answer.
var errSilent = errors.New("control: the host does not answer")

// pingEvery is how often a host that works at a request is pinged meanwhile.
const pingEvery = 2 * time.Second

// DecodeRequest reads one request.
func DecodeRequest(b []byte) (Request, error) {
	var r Request
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		return Request{}, fmt.Errorf("control: %w", err)
	}
	return r, nil
}

// maxSocketPath is sockaddr_un's sun_path without its NUL.
const maxSocketPath = 107

// SocketPath is the control socket of a host of a volume. A host name that does
// not fit into a socket's address gives way to its digest.
func SocketPath(runDir string, volume [16]byte, host string) string {
	dir := RunDirOf(runDir, volume)
	if len(dir)+len("/")+len(host)+len(".sock") > maxSocketPath {
		host = fmt.Sprintf("%x", sha256.Sum256([]byte(host)))[:16]
	}
	return filepath.Join(dir, host+".sock")
}

// Ask sends a request to the control socket at path. ErrNoControl: nobody answers
// there.
func Ask(ctx context.Context, path string, req Request) (Response, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return Response{}, fmt.Errorf("%w: %w", ErrNoControl, err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if err := json.NewEncoder(c).Encode(req); err != nil {
		return Response{}, fmt.Errorf("control: %w", err)
	}
	var resp Response
	if err := json.NewDecoder(io.LimitReader(c, maxRequest)).Decode(&resp); err != nil {
		return Response{}, errors.Join(ctx.Err(), fmt.Errorf("control: the host at %s ended without an answer: %w", path, err))
	}
	if resp.Error != nil {
		return Response{}, resp.Error
	}
	return resp, nil
}

// ErrNoControl: no host answers on a control socket.
var ErrNoControl = errors.New("control: no host answers")

// control serves a host's control socket.
type control struct {
	l      *net.UnixListener
	handle func(context.Context, Request) (Response, error)
	code   func(error) int
	log    *slog.Logger
	conns  sync.WaitGroup
}

// listenControl creates the socket, for root only. A socket that nobody answers on
// is replaced.
func listenControl(path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	l, err := listenUnix(path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// listenUnix listens on a unix socket, in the place of one that nobody answers on.
func listenUnix(path string) (*net.UnixListener, error) {
	addr := &net.UnixAddr{Name: path, Net: "unix"}
	c, err := net.DialUnix("unix", nil, addr)
	switch {
	case err == nil:
		_ = c.Close() // it was only asked whether somebody is there
		return nil, fmt.Errorf("%s: another process listens there", path)
	case errors.Is(err, syscall.ECONNREFUSED):
		// The socket of a process that is gone; other errors, of a full backlog for one,
		// do not tell so.
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	return net.ListenUnix("unix", addr)
}

// serve answers until the listener is closed.
func (c *control) serve(ctx context.Context) {
	for {
		conn, err := c.l.AcceptUnix()
		if err != nil {
			c.conns.Wait()
			return
		}
		c.conns.Go(func() { c.answer(ctx, conn) })
	}
}

func (c *control) answer(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := conn.SetReadDeadline(deadline()); err != nil {
		return
	}
	var raw json.RawMessage
	if err := json.NewDecoder(io.LimitReader(conn, maxRequest)).Decode(&raw); err != nil {
		return // a probe, or nonsense
	}
	req, err := DecodeRequest(raw)
	var resp Response
	if err == nil {
		resp, err = c.handle(ctx, req)
	}
	if err != nil {
		resp = Response{Error: &RemoteError{Code: c.code(err), Message: err.Error()}}
	}
	if err := conn.SetWriteDeadline(deadline()); err != nil {
		return
	}
	if err := json.NewEncoder(conn).Encode(resp); err != nil {
		c.log.Warn("control: answer not taken", "verb", req.Verb, "error", err)
	}
}
