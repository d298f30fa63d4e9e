package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"basalt/datastore"
	"basalt/vmfs"
)

// entryInfo is an object as "fs ls" and "fs stat" show it.
type entryInfo struct {
	Name      string    `json:"name"`
	Kind      string    `json:"kind"`
	SizeBytes int64     `json:"size_bytes"`
	Modified  time.Time `json:"modified"`
	Object    string    `json:"object"`
	LockedBy  string    `json:"locked_by"`
}

func describe(ctx context.Context, ds *datastore.Datastore, info vmfs.Info) (entryInfo, error) {
	o, err := ds.Volume().OpenView(ctx, info.Ref)
	if err != nil {
		return entryInfo{}, err
	}
	h, err := o.Header(ctx)
	if err != nil {
		return entryInfo{}, err
	}
	e := entryInfo{Name: info.Name, Kind: info.Kind.String(), SizeBytes: h.SizeBytes, Modified: h.Modified.UTC(), Object: info.Ref.String()}
	holder, err := ds.Holder(ctx, info.Ref)
	if holder != nil {
		e.LockedBy = holder.Register.HostName
	}
	return e, err
}

// onObject adapts a verb whose one argument is an object.
func (a *app) onObject(f func(ctx context.Context, addr datastore.Address) error) func(*cobra.Command, []string) error {
	return func(c *cobra.Command, args []string) error {
		addr, err := plainAddress(args[0])
		if err != nil {
			return err
		}
		return f(c.Context(), addr)
	}
}

func (a *app) fsLs() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use: "ls LUN[:/path]", Short: "List a folder", Args: args(1, 1),
		RunE: func(c *cobra.Command, args []string) error {
			addr, err := datastore.ParseAddress(args[0])
			if err != nil {
				return err
			}
			list := []entryInfo{}
			err = a.withView(c.Context(), addr.LUN, func(ds *datastore.Datastore) error {
				list, err = a.list(c.Context(), ds, addr.Path)
				return err
			})
			if err != nil {
				return err
			}
			if a.json {
				return a.emit(items[entryInfo]{list})
			}
			w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
			for _, e := range list {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", e.Kind, bytesText(e.SizeBytes), e.Modified.Format(time.RFC3339), e.Name)
			}
			return w.Flush()
		},
	})
}

func (a *app) list(ctx context.Context, ds *datastore.Datastore, path string) ([]entryInfo, error) {
	at, err := ds.Volume().Lookup(ctx, path)
	if err != nil {
		return nil, err
	}
	infos := []vmfs.Info{at}
	if at.Kind == vmfs.KindFolder {
		if infos, err = ds.Volume().List(ctx, at.Ref); err != nil {
			return nil, err
		}
	}
	out := []entryInfo{}
	for _, info := range infos {
		e, err := describe(ctx, ds, info)
		if errors.Is(err, vmfs.ErrNotFound) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out, nil
}

func (a *app) fsStat() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use: "stat LUN:/path", Short: "Describe an object", Args: args(1, 1),
		RunE: a.onObject(func(ctx context.Context, addr datastore.Address) error {
			return a.withView(ctx, addr.LUN, func(ds *datastore.Datastore) error {
				info, err := ds.Volume().Lookup(ctx, addr.Path)
				if err != nil {
					return err
				}
				e, err := describe(ctx, ds, info)
				if err != nil {
					return err
				}
				if a.json {
					return a.emit(e)
				}
				fmt.Fprintf(a.out, "name      %s\nkind      %s\nsize      %d bytes\nmodified  %s\nobject    %s\nlocked by %s\n",
					e.Name, e.Kind, e.SizeBytes, e.Modified.Format(time.RFC3339), e.Object, e.LockedBy)
				return nil
			})
		}),
	})
}

func (a *app) fsMkdir() *cobra.Command {
	var parents bool
	c := &cobra.Command{
		Use: "mkdir LUN:/path", Short: "Make a folder", Args: args(1, 1),
		RunE: a.onObject(func(ctx context.Context, addr datastore.Address) error {
			return a.withMount(ctx, addr.LUN, func(ds *datastore.Datastore) error {
				if parents {
					return mkdirAll(ctx, ds, addr.Path)
				}
				return ds.Volume().Mkdir(ctx, addr.Path)
			})
		}),
	}
	c.Flags().BoolVarP(&parents, "parents", "p", false, "make the folders above it too; no error if it exists")
	return c
}

func mkdirAll(ctx context.Context, ds *datastore.Datastore, path string) error {
	names, err := vmfs.SplitPath(path)
	if err != nil {
		return err
	}
	for i := range names {
		dir := "/" + strings.Join(names[:i+1], "/")
		err := ds.Volume().Mkdir(ctx, dir)
		if errors.Is(err, vmfs.ErrExists) {
			info, lerr := ds.Volume().Lookup(ctx, dir)
			if err = lerr; err == nil && info.Kind != vmfs.KindFolder {
				err = fmt.Errorf("%s: %w", dir, vmfs.ErrNotFolder)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (a *app) fsRm() *cobra.Command {
	var recursive bool
	c := &cobra.Command{
		Use: "rm LUN:/path...", Short: "Remove files, disks and folders", Args: args(1, -1),
		RunE: func(c *cobra.Command, args []string) error {
			addrs, err := a.existing(c.Context(), args)
			if err != nil {
				return err
			}
			if err := a.confirm("remove %s", strings.Join(args, ", ")); err != nil {
				return err
			}
			for _, addr := range addrs {
				if err := a.withMount(c.Context(), addr.LUN, func(ds *datastore.Datastore) error {
					return remove(c.Context(), ds, addr.Path, recursive)
				}); err != nil {
					return err
				}
			}
			return nil
		},
	}
	c.Flags().BoolVarP(&recursive, "recursive", "r", false, "remove a folder with all that is in it")
	return a.yesFlag(c)
}

// existing parses addresses and makes sure that all of them name something, before
// anything is done to the first.
func (a *app) existing(ctx context.Context, args []string) ([]datastore.Address, error) {
	var addrs []datastore.Address
	for _, arg := range args {
		addr, err := plainAddress(arg)
		if err != nil {
			return nil, err
		}
		if err := a.withView(ctx, addr.LUN, func(ds *datastore.Datastore) error {
			_, err := ds.Volume().Lookup(ctx, addr.Path)
			return err
		}); err != nil {
			return nil, err
		}
		addrs = append(addrs, addr)
	}
	return addrs, nil
}

// remove removes an object; with recursive, the content of a folder first.
func remove(ctx context.Context, ds *datastore.Datastore, path string, recursive bool) error {
	info, err := ds.Volume().Lookup(ctx, path)
	if err != nil {
		return err
	}
	switch {
	case info.Kind == vmfs.KindDisk:
		return ds.RemoveDisk(ctx, path)
	case info.Kind == vmfs.KindFolder && recursive:
		list, err := ds.Volume().List(ctx, info.Ref)
		if err != nil {
			return err
		}
		for _, e := range list {
			if err := remove(ctx, ds, path+"/"+e.Name, true); err != nil {
				return err
			}
		}
	}
	err = ds.Volume().Remove(ctx, path)
	if errors.Is(err, vmfs.ErrNotEmpty) {
		err = fmt.Errorf("%w; give -r to remove it with all that is in it", err)
	}
	return err
}

func (a *app) fsMv() *cobra.Command {
	return &cobra.Command{
		Use: "mv LUN:/path LUN:/newpath", Short: "Rename or move an object within its volume", Args: args(2, 2),
		RunE: func(c *cobra.Command, args []string) error {
			from, err := plainAddress(args[0])
			if err != nil {
				return err
			}
			to, err := plainAddress(args[1])
			if err != nil {
				return err
			}
			if from.LUN != to.LUN {
				return usagef("%s and %s are different LUNs; mv stays within one", from.LUN, to.LUN)
			}
			return a.withMount(c.Context(), from.LUN, func(ds *datastore.Datastore) error {
				return ds.Rename(c.Context(), from.Path, to.Path)
			})
		},
	}
}

func (a *app) fsCat() *cobra.Command {
	return &cobra.Command{
		Use: "cat LUN:/path", Short: "Write a file's content to the standard output", Args: args(1, 1),
		RunE: a.onObject(func(ctx context.Context, addr datastore.Address) error {
			return a.withMount(ctx, addr.LUN, func(ds *datastore.Datastore) error {
				return ds.Volume().Get(ctx, addr.Path, a.out, nil)
			})
		}),
	}
}

func (a *app) fsPut() *cobra.Command {
	return &cobra.Command{
		Use: "put FILE LUN:/path", Short: "Copy a file onto the volume (FILE may be -)", Args: args(2, 2),
		RunE: func(c *cobra.Command, args []string) error {
			addr, err := plainAddress(args[1])
			if err != nil {
				return err
			}
			src, total := io.Reader(stdin{c.Context(), a.in}), int64(0)
			if args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return err
				}
				defer f.Close()
				fi, err := f.Stat()
				if err != nil {
					return err
				}
				src, total = f, fi.Size()
			}
			p := a.progress("put", total)
			defer p.end()
			return a.withMount(c.Context(), addr.LUN, func(ds *datastore.Datastore) error {
				return ds.Volume().Put(c.Context(), addr.Path, src, p.at)
			})
		},
	}
}

// stdin is the standard input, whose wait for more ends with ctx.
type stdin struct {
	ctx context.Context
	in  io.Reader
}

// stdinPoll is how long the wait lasts until ctx is looked at again, in
// milliseconds.
const stdinPoll = 100

func (s stdin) Read(p []byte) (int, error) {
	f, ok := s.in.(*os.File)
	if !ok {
		return s.in.Read(p)
	}
	ready := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLIN}}
	for {
		if err := s.ctx.Err(); err != nil {
			return 0, err
		}
		n, err := unix.Poll(ready, stdinPoll)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return 0, fmt.Errorf("standard input: %w", err)
		}
		if n > 0 {
			return f.Read(p)
		}
	}
}

func (a *app) fsGet() *cobra.Command {
	c := &cobra.Command{
		Use: "get LUN:/path FILE", Short: "Copy a file off the volume (FILE may be -)", Args: args(2, 2),
		RunE: func(c *cobra.Command, args []string) error {
			addr, err := plainAddress(args[0])
			if err != nil {
				return err
			}
			return a.get(c.Context(), addr, args[1])
		},
	}
	return a.yesFlag(c)
}

func (a *app) get(ctx context.Context, addr datastore.Address, file string) error {
	p := a.progress("get", 0)
	defer p.end()
	copyTo := func(w io.Writer) error {
		return a.withMount(ctx, addr.LUN, func(ds *datastore.Datastore) error {
			return ds.Volume().Get(ctx, addr.Path, w, p.at)
		})
	}
	if file == "-" {
		return copyTo(a.out)
	}
	return a.writeFile(ctx, file, func(partial string) error {
		f, err := os.OpenFile(partial, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(copyTo(f), f.Close())
	})
}
