package main

import (
	"context"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"basalt/datastore"
	"basalt/store"
)

// maxDiskBytes is the largest disk.
const maxDiskBytes = 62 << 40

func (a *app) diskCommand() *cobra.Command {
	return group("disk", "Thin disks: create, snapshot, clone, copy in and out, serve",
		a.diskCreate(), a.diskLs(), a.diskInfo(), a.diskRm(), a.diskClone(), a.diskImport(), a.diskExport(), a.diskServe(),
		group("snapshot", "Snapshots of a disk, at constant cost", a.snapshotCreate(), a.snapshotLs(), a.snapshotRm()))
}

// execute sends a request to where the disk is: its holder on this machine, or a
// mount of this process's own.
func (a *app) execute(ctx context.Context, addr datastore.Address, req store.Request) (store.Response, error) {
	req.Path = addr.Path
	return store.Execute(ctx, addr.LUN, a.host(), a.clk, a.log, req)
}

func (a *app) diskCreate() *cobra.Command {
	var size sizeFlag
	var policy string
	c := &cobra.Command{
		Use: "create LUN:/path --size SIZE", Short: "Make an empty thin disk", Args: args(1, 1),
		RunE: a.onObject(func(ctx context.Context, addr datastore.Address) error {
			if err := checkDiskSize(int64(size)); err != nil {
				return err
			}
			if policy != "thin" {
				return usagef("policy %q: only thin is built so far", policy)
			}
			return a.withMount(ctx, addr.LUN, func(ds *datastore.Datastore) error {
				return ds.CreateDisk(ctx, addr.Path, int64(size))
			})
		}),
	}
	c.Flags().Var(&size, "size", "size that the guest sees, a multiple of 512")
	c.Flags().StringVar(&policy, "policy", "thin", "how space is allocated; thin: when it is first written")
	return c
}

func checkDiskSize(size int64) error {
	switch {
	case size <= 0:
		return usagef("a disk needs a --size")
	case size%512 != 0:
		return usagef("a disk of %d bytes: want a multiple of 512", size)
	case size > maxDiskBytes:
		return usagef("a disk of %s: at most %s are possible", bytesText(size), bytesText(maxDiskBytes))
	}
	return nil
}

func (a *app) diskLs() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use: "ls LUN[:/path]", Short: "List disks at or below a path", Args: args(1, 1),
		RunE: func(c *cobra.Command, args []string) error {
			addr, err := datastore.ParseAddress(args[0])
			if err != nil {
				return err
			}
			var list []datastore.DiskInfo
			if err := a.withView(c.Context(), addr.LUN, func(ds *datastore.Datastore) error {
				list, err = ds.ListDisks(c.Context(), addr.Path)
				return err
			}); err != nil {
				return err
			}
			if a.json {
				return a.emit(items[datastore.DiskInfo]{list})
			}
			w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "DISK\tSIZE\tMAPPED\tSNAPSHOTS\tHELD BY")
			for _, d := range list {
				fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\n", d.Path, bytesText(d.SizeBytes), bytesText(d.MappedBytes), len(d.Snapshots), d.LockedBy)
			}
			return w.Flush()
		},
	})
}

func (a *app) diskInfo() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use: "info LUN:/path", Short: "Describe a disk and its use of space", Args: args(1, 1),
		RunE: a.onObject(func(ctx context.Context, addr datastore.Address) error {
			r, err := a.execute(ctx, addr, store.Request{Verb: store.VerbInfo})
			if err != nil {
				return err
			}
			d := r.Disk
			if a.json {
				return a.emit(d)
			}
			fmt.Fprintf(a.out, "disk       %s\nsize       %s (%d bytes)\nmapped     %s\nexclusive  %s\nshared     %s\npolicy     %s\nheld by    %s\nuuid       %s\n",
				d.Path, bytesText(d.SizeBytes), d.SizeBytes, bytesText(d.MappedBytes), bytesText(d.ExclusiveBytes), bytesText(d.SharedBytes), d.Policy, orNobody(d.LockedBy), d.UUID)
			if d.Origin != "" {
				fmt.Fprintf(a.out, "clone of   snapshot %s\n", d.Origin)
			}
			return a.snapshotTable(d.Snapshots)
		}),
	})
}

func orNobody(host string) string {
	if host == "" {
		return "nobody"
	}
	return host
}

func (a *app) snapshotTable(list []datastore.SnapshotInfo) error {
	if len(list) == 0 {
		return nil
	}
	w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "SNAPSHOT\tCREATED\tMAPPED\tEXCLUSIVE")
	for _, s := range list {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", s.Name, s.Created.Format(time.RFC3339), bytesText(s.MappedBytes), bytesText(s.ExclusiveBytes))
	}
	return w.Flush()
}

func (a *app) diskRm() *cobra.Command {
	return a.yesFlag(&cobra.Command{
		Use: "rm LUN:/path", Short: "Remove a disk with its snapshots", Args: args(1, 1),
		RunE: a.onObject(func(ctx context.Context, addr datastore.Address) error {
			if err := a.confirm("remove disk %s with its snapshots", addr); err != nil {
				return err
			}
			_, err := a.execute(ctx, addr, store.Request{Verb: store.VerbRemove})
			return err
		}),
	})
}

func (a *app) diskClone() *cobra.Command {
	return &cobra.Command{
		Use: "clone LUN:/path@SNAPSHOT LUN:/newpath", Short: "Make a disk that starts as a snapshot and shares its blocks", Args: args(2, 2),
		RunE: func(c *cobra.Command, args []string) error {
			from, err := objectAddress(args[0])
			if err != nil {
				return err
			}
			to, err := plainAddress(args[1])
			if err != nil {
				return err
			}
			switch {
			case from.Snapshot == "":
				return usagef("a clone starts from a snapshot: take one, and write %s@NAME", from)
			case from.LUN != to.LUN:
				return usagef("%s and %s are different LUNs; a clone shares blocks and stays on its LUN", from.LUN, to.LUN)
			}
			_, err = a.execute(c.Context(), from, store.Request{Verb: store.VerbClone, Name: from.Snapshot, To: to.Path})
			return err
		},
	}
}

func (a *app) snapshotCreate() *cobra.Command {
	return &cobra.Command{
		Use: "create LUN:/path NAME", Short: "Take a snapshot of a disk, in use or not", Args: args(2, 2),
		RunE: a.onSnapshot(func(ctx context.Context, addr datastore.Address, name string) error {
			_, err := a.execute(ctx, addr, store.Request{Verb: store.VerbSnapshotCreate, Name: name})
			return err
		}),
	}
}

func (a *app) snapshotLs() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use: "ls LUN:/path", Short: "List a disk's snapshots, oldest first", Args: args(1, 1),
		RunE: a.onObject(func(ctx context.Context, addr datastore.Address) error {
			r, err := a.execute(ctx, addr, store.Request{Verb: store.VerbInfo})
			if err != nil {
				return err
			}
			if a.json {
				return a.emit(items[datastore.SnapshotInfo]{r.Disk.Snapshots})
			}
			return a.snapshotTable(r.Disk.Snapshots)
		}),
	})
}

func (a *app) snapshotRm() *cobra.Command {
	return a.yesFlag(&cobra.Command{
		Use: "rm LUN:/path NAME", Short: "Delete a snapshot and free what only it holds", Args: args(2, 2),
		RunE: a.onSnapshot(func(ctx context.Context, addr datastore.Address, name string) error {
			if err := a.confirm("delete snapshot %q of %s", name, addr); err != nil {
				return err
			}
			_, err := a.execute(ctx, addr, store.Request{Verb: store.VerbSnapshotRemove, Name: name})
			return err
		}),
	})
}

// onSnapshot adapts a verb whose arguments are a disk and the name of a snapshot.
func (a *app) onSnapshot(f func(ctx context.Context, addr datastore.Address, name string) error) func(*cobra.Command, []string) error {
	return func(c *cobra.Command, args []string) error {
		addr, err := plainAddress(args[0])
		if err != nil {
			return err
		}
		return f(c.Context(), addr, args[1])
	}
}
