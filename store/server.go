// Package store composes a host's data daemon: a mounted volume, its disks served
// by NBD, and the control socket over which commands on this machine reach the
// disks that it holds.
//
// It does not start guests, and decides nothing about who should serve which disk.
//
// Serve owns everything it starts and returns after all of it has ended. The package
// has no locks of its own.
package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"basalt/datastore"
	"basalt/internal/clock"
	"basalt/lease"
	"basalt/nbd"
)

// ServeOptions say what a host serves.
type ServeOptions struct {
	Host     Host
	Listen   []string // "unix:PATH" or "tcp:HOST:PORT"
	Only     []string // paths of the disks to export; empty: all, later ones too
	ReadOnly bool
	// SocketUID and SocketGID own the unix sockets, so that an unprivileged QEMU can
	// connect; -1 leaves them to this process's user.
	SocketUID, SocketGID int
	// Ready, if set, is called once everything listens.
	Ready func(Started)
	// Code gives the exit code of an error, for answers on the control socket.
	Code func(error) int
}

// Started describes a server that has come up.
type Started struct {
	HostName   string
	Slot       int
	Generation uint32
	Listen     []string
	Control    string
}

// drainTimeout is how long a server that is told to stop waits for its clients'
// requests.
const drainTimeout = 20 * time.Second

// deadline is when a peer on a socket has taken too long.
func deadline() time.Time { return clock.System{}.Wall().Add(controlTimeout) }

// ErrListen: not an address to listen at.
var ErrListen = errors.New("store: cannot listen at")

// ErrStopped: the server ended because its generation was lost.
var ErrStopped = errors.New("store: this host was cut off from the volume")

// Serve mounts the volume on a LUN and serves until ctx ends or the lease is lost.
func Serve(ctx context.Context, lun string, clk clock.Clock, log *slog.Logger, opts ServeOptions) error {
	listeners, err := listenAll(opts.Listen, opts.SocketUID, opts.SocketGID)
	if err != nil {
		return err
	}
	defer closeAll(listeners)
	for i, l := range listeners {
		if l.Addr().Network() == "tcp" {
			opts.Listen[i] = "tcp:" + l.Addr().String() // the port that port 0 became
		}
	}
	opts.Host.Server = true
	ds, err := Mount(ctx, lun, opts.Host, clk, log)
	if err != nil {
		return err
	}
	s := &server{ds: ds, clk: clk, log: log, opts: opts, listeners: listeners}
	err = s.run(ctx)
	closed := ds.Close(context.WithoutCancel(ctx))
	if errors.Is(err, ErrStopped) && errors.Is(closed, lease.ErrLost) {
		return err // the same, told already
	}
	return errors.Join(err, closed)
}

type server struct {
	ds        *datastore.Datastore
	clk       clock.Clock
	log       *slog.Logger
	opts      ServeOptions
	listeners []net.Listener
	exports   *exports
}

func (s *server) run(ctx context.Context) error {
	vol := s.ds.Volume()
	session := vol.Session()
	only, err := s.checkPaths(ctx)
	if err != nil {
		return err
	}
	s.exports = &exports{ds: s.ds, only: only, readOnly: s.opts.ReadOnly}
	socket := SocketPath(s.opts.Host.RunDir, vol.Superblock().Volume, s.opts.Host.Name)
	cl, err := listenControl(socket)
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	server, err := nbd.New(s.exports, s.clk, s.log, nbd.Options{})
	if err != nil {
		return errors.Join(err, cl.Close())
	}
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel() // before the wait
	failed := make(chan error, len(s.listeners)+1)
	for _, l := range s.listeners {
		all.Go(func() {
			if err := server.Serve(context.WithoutCancel(ctx), l); err != nil {
				failed <- fmt.Errorf("nbd: %w", err)
			}
		})
	}
	c := &control{l: cl, handle: s.do, code: s.opts.Code, log: s.log}
	all.Go(func() { c.serve(ctx) })
	all.Go(func() {
		if err := session.Watch(ctx); err != nil && ctx.Err() == nil && session.Err() == nil {
			failed <- err
		}
	})
	if s.opts.Ready != nil {
		s.opts.Ready(Started{s.opts.Host.Name, session.Slot(), session.Generation(), s.opts.Listen, socket})
	}
	select {
	case <-ctx.Done():
	case err = <-failed:
	case <-session.Lost():
		err = fmt.Errorf("%w: %w", ErrStopped, session.Err())
	}
	err = errors.Join(err, cl.Close())
	drain, stop := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer stop()
	return errors.Join(err, server.Shutdown(drain))
}

// checkPaths makes sure that every disk asked for exists, so that a typing error
// is told at once.
func (s *server) checkPaths(ctx context.Context) ([]string, error) {
	var only []string
	for _, p := range s.opts.Only {
		if _, err := s.ds.Brief(ctx, p); err != nil {
			return nil, err
		}
		only = append(only, strings.Trim(p, "/"))
	}
	return only, nil
}

// do carries out a request from the control socket.
func (s *server) do(ctx context.Context, req Request) (Response, error) {
	switch req.Verb {
	case VerbPing:
		return Response{}, nil
	case VerbExport:
		return s.where(ctx, req)
	}
	return Do(ctx, s.ds, req)
}

// where answers at which of this server's addresses a disk or snapshot can be read.
func (s *server) where(ctx context.Context, req Request) (Response, error) {
	name := strings.Trim(req.Path, "/")
	if req.Name != "" {
		name += "@" + req.Name
	} else {
		return Response{}, fmt.Errorf("%s: %w: take a snapshot and export that", req.Path, datastore.ErrDiskOpen)
	}
	if _, err := s.exports.Describe(ctx, name); err != nil {
		return Response{}, err
	}
	return Response{NBD: URI(s.opts.Listen[0], name)}, nil
}

// Do carries out a request on a datastore that this process has mounted.
func Do(ctx context.Context, ds *datastore.Datastore, req Request) (Response, error) {
	switch req.Verb {
	case VerbInfo:
		info, err := ds.Info(ctx, req.Path)
		return Response{Disk: &info}, err
	case VerbRemove:
		return Response{}, ds.RemoveDisk(ctx, req.Path)
	case VerbClone:
		return Response{}, ds.Clone(ctx, req.Path, req.Name, req.To)
	case VerbSnapshotCreate:
		return Response{}, ds.CreateSnapshot(ctx, req.Path, req.Name)
	case VerbSnapshotRemove:
		return Response{}, ds.RemoveSnapshot(ctx, req.Path, req.Name)
	}
	return Response{}, fmt.Errorf("control: this host does not know %q; is it of another version?", req.Verb)
}

// URI names an export of a server that listens at an address, as NBD clients write
// it.
func URI(listen, export string) string {
	export = uriEscape(export)
	if path, ok := strings.CutPrefix(listen, "unix:"); ok {
		return "nbd+unix:///" + export + "?socket=" + uriEscape(path)
	}
	return "nbd://" + strings.TrimPrefix(listen, "tcp:") + "/" + export
}

// uriEscape percent-encodes all but unreserved characters and slashes (RFC 3986 §2.3).
func uriEscape(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~/", c) >= 0 {
			b.WriteByte(c)
			continue
		}
		fmt.Fprintf(&b, "%%%02X", c)
	}
	return b.String()
}

// listenAll opens the listeners named "unix:PATH" and "tcp:HOST:PORT".
func listenAll(addrs []string, uid, gid int) ([]net.Listener, error) {
	var out []net.Listener
	for _, a := range addrs {
		l, err := listen(a, uid, gid)
		if err != nil {
			closeAll(out)
			return nil, err
		}
		out = append(out, l)
	}
	return out, nil
}

func listen(addr string, uid, gid int) (net.Listener, error) {
	kind, rest, _ := strings.Cut(addr, ":")
	switch {
	case kind == "unix" && rest != "":
		l, err := listenUnix(rest)
		if err != nil {
			return nil, err
		}
		if err := errors.Join(os.Chmod(rest, 0o660), os.Chown(rest, uid, gid)); err != nil {
			return nil, errors.Join(err, l.Close())
		}
		return l, nil
	case kind == "tcp" && rest != "":
		return net.Listen("tcp", rest)
	}
	return nil, fmt.Errorf("%w %q: want unix:PATH or tcp:HOST:PORT", ErrListen, addr)
}

func closeAll(ls []net.Listener) {
	for _, l := range ls {
		_ = l.Close() // closed already when it served
	}
}
