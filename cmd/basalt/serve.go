package main

import (
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"basalt/lease"
	"basalt/store"
)

func (a *app) diskServe() *cobra.Command {
	var listen []string
	var readOnly bool
	var owner string
	c := &cobra.Command{
		Use:   "serve LUN --nbd unix:PATH|tcp:HOST:PORT [PATH...]",
		Short: "Serve disks by NBD as a host of the volume, until told to stop",
		Long: `Serve disks by NBD as a host of the volume, until SIGINT, SIGTERM or SIGHUP.

Disks are exported by path (vm1/d0), snapshots as vm1/d0@NAME, read-only. With no
PATH all disks are served, later ones too. A disk's lock is taken at its first
connection and dropped after its last; a dead host's disk is taken over then.
NBD over TCP is neither encrypted nor authenticated: use it on trusted networks.`,
		Args: args(1, -1),
		RunE: func(c *cobra.Command, args []string) error {
			lun, err := lunAddress(args[0])
			if err != nil {
				return err
			}
			if len(listen) == 0 {
				return usagef("say where to serve: --nbd unix:PATH or --nbd tcp:HOST:PORT")
			}
			uid, gid, err := parseOwner(owner)
			if err != nil {
				return err
			}
			log := slog.New(slog.NewTextHandler(a.err, nil))
			h := a.host()
			h.OnBreak = func(r lease.BreakReport) { a.reportBreak(a.out, r) }
			return store.Serve(c.Context(), lun, a.clk, log, store.ServeOptions{
				Host: h, Listen: listen, Only: args[1:], ReadOnly: readOnly, SocketUID: uid, SocketGID: gid, Ready: a.reportReady, Code: exitCode,
			})
		},
	}
	c.Flags().StringArrayVar(&listen, "nbd", nil, "where to listen; may be given several times")
	c.Flags().BoolVar(&readOnly, "read-only", false, "refuse all writes")
	c.Flags().StringVar(&owner, "nbd-owner", "", "UID[:GID] that may connect to the unix sockets (default: root alone)")
	return c
}

// parseOwner reads UID[:GID]; -1 means to leave an id as it is.
func parseOwner(s string) (uid, gid int, err error) {
	if s == "" {
		return -1, -1, nil
	}
	u, g, both := strings.Cut(s, ":")
	uid, err = strconv.Atoi(u)
	gid = -1
	if err == nil && both {
		gid, err = strconv.Atoi(g)
	}
	if err != nil || uid < 0 {
		return 0, 0, usagef("--nbd-owner %q: want UID or UID:GID, as numbers", s)
	}
	return uid, gid, nil
}

func (a *app) reportReady(s store.Started) {
	fmt.Fprintf(a.out, "host %s (slot %d, generation %d) serves on %s; control socket %s\n",
		s.HostName, s.Slot, s.Generation, strings.Join(s.Listen, ", "), s.Control)
}

// reportBreak tells of a dead host in one plain line.
func (a *app) reportBreak(w io.Writer, r lease.BreakReport) {
	who := fmt.Sprintf("host %s (slot %d, generation %d)", r.HostName, r.Slot, r.Generation)
	switch {
	case r.Err != nil:
		fmt.Fprintf(w, "%s was not fenced: %v\n", who, r.Err)
	case r.Proven:
		fmt.Fprintf(w, "%s is gone, its lock on the LUN is free: fenced in %v\n", who, r.FenceTime.Round(time.Microsecond))
	default:
		fmt.Fprintf(w, "%s was silent for %v: fenced in %v\n", who, r.Silence.Round(time.Millisecond), r.FenceTime.Round(time.Microsecond))
	}
}
