package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"basalt/block/filedev"
	"basalt/datastore"
	"basalt/internal/clock"
	"basalt/nbd"
)

// Execute carries a request out where its disk is: by the host on this machine that
// holds the disk, over its control socket, else by this process with a slot of its
// own for as long as it takes. A disk's info is read without a slot.
func Execute(ctx context.Context, lun string, h Host, clk clock.Clock, log *slog.Logger, req Request) (Response, error) {
	view, err := View(ctx, lun, clk)
	if err != nil {
		return Response{}, err
	}
	resp, err := askHolder(ctx, view, h, clk, req)
	if errors.Is(err, ErrNoControl) && req.Verb == VerbInfo {
		resp, err = Do(ctx, view, req)
	}
	err = errors.Join(err, view.Close(ctx))
	if !errors.Is(err, ErrNoControl) {
		return resp, err
	}
	if errors.Is(err, errSilent) {
		log.Warn("the server that holds the disk does not answer; it is cut off if it stays silent for its lease", "disk", req.Path)
	}
	ds, err := Mount(ctx, lun, h, clk, log)
	if err != nil {
		return Response{}, err
	}
	resp, err = Do(ctx, ds, req)
	return resp, errors.Join(err, ds.Close(context.WithoutCancel(ctx)))
}

// askHolder sends the request to the host on this machine that holds its disk;
// ErrNoControl when there is none.
func askHolder(ctx context.Context, view *datastore.Datastore, h Host, clk clock.Clock, req Request) (Response, error) {
	info, err := view.Volume().Lookup(ctx, req.Path)
	if err != nil {
		return Response{}, err
	}
	holder, err := view.Holder(ctx, info.Ref)
	if err != nil {
		return Response{}, err
	}
	id, err := filedev.MachineID()
	if err != nil {
		return Response{}, err
	}
	if holder == nil || holder.Register.HostID != id {
		return Response{}, ErrNoControl
	}
	socket := SocketPath(h.RunDir, view.Volume().Superblock().Volume, holder.Register.HostName)
	if err := ping(ctx, socket); err != nil {
		return Response{}, err
	}
	// It may freeze later, in the middle of the request, too.
	watched, freeze := context.WithCancelCause(ctx)
	defer freeze(nil)
	go func() {
		for watched.Err() == nil {
			t := clk.NewTimer(pingEvery)
			select {
			case <-t.C:
				if err := ping(watched, socket); err != nil {
					freeze(err)
				}
			case <-watched.Done():
				t.Stop()
			}
		}
	}()
	resp, err := Ask(watched, socket, req)
	if frozen := context.Cause(watched); err != nil && errors.Is(frozen, ErrNoControl) {
		err = frozen
	}
	return resp, err
}

// ping makes sure that somebody answers on a control socket: the kernel takes
// connections for a host that is frozen. Such a host is ErrNoControl, so that it is
// treated as any other that does not answer.
func ping(ctx context.Context, socket string) error {
	short, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	_, err := Ask(short, socket, Request{Verb: VerbPing})
	if err != nil && ctx.Err() == nil && !errors.Is(err, ErrNoControl) {
		err = fmt.Errorf("%w: %w: %w", ErrNoControl, errSilent, err)
	}
	return err
}

// AskHolder sends the request to the host on this machine that holds its disk;
// ErrNoControl when there is none.
func AskHolder(ctx context.Context, lun string, h Host, clk clock.Clock, req Request) (Response, error) {
	view, err := View(ctx, lun, clk)
	if err != nil {
		return Response{}, err
	}
	resp, err := askHolder(ctx, view, h, clk, req)
	return resp, errors.Join(err, view.Close(ctx))
}

// ServeFor serves one disk or snapshot of a mounted datastore, by NBD on a socket
// of its own at path, while f runs. f gets the NBD URI.
func ServeFor(ctx context.Context, ds *datastore.Datastore, clk clock.Clock, log *slog.Logger, path, name string, readOnly bool, f func(uri string) error) error {
	name = strings.Trim(name, "/")
	disk, _, _ := strings.Cut(name, "@")
	e := &exports{ds: ds, only: []string{disk}, readOnly: readOnly}
	// Opened here first: a client is told only in words why it cannot have it.
	opened, err := e.Open(ctx, name)
	if err != nil {
		return err
	}
	return errors.Join(serveOpened(ctx, e, clk, log, path, name, f), opened.Close())
}

func serveOpened(ctx context.Context, e *exports, clk clock.Clock, log *slog.Logger, path, name string, f func(uri string) error) error {
	l, err := listen("unix:"+path, -1, -1)
	if err != nil {
		return err
	}
	server, err := nbd.New(e, clk, log, nbd.Options{})
	if err != nil {
		return errors.Join(err, l.Close())
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.WithoutCancel(ctx), l) }()
	err = f(URI("unix:"+path, name))
	drain, stop := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer stop()
	return errors.Join(err, server.Shutdown(drain), <-served)
}
