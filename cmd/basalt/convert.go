package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"basalt/datastore"
	"basalt/store"
	"basalt/vmfs"
)

// imageFormats are the foreign formats that are copied in and out by qemu-img.
var imageFormats = []string{"raw", "qcow2"}

func checkFormat(format string, more ...string) error {
	for _, f := range append(more, imageFormats...) {
		if f == format {
			return nil
		}
	}
	return usagef("format %q; known: %s", format, strings.Join(append(more, imageFormats...), ", "))
}

func (a *app) diskImport() *cobra.Command {
	var format string
	c := &cobra.Command{
		Use: "import FILE LUN:/path", Short: "Make a disk with the content of an image file", Args: args(2, 2),
		Long: `Make a disk with the content of an image file, through qemu-img. Holes stay
holes. An image that refers to other files (a backing file, an external data file)
is refused. With --format auto a raw image is told by having no other format's
mark; name the format when the image comes from a stranger.`,
		RunE: func(c *cobra.Command, args []string) error {
			addr, err := plainAddress(args[1])
			if err != nil {
				return err
			}
			if args[0] == "-" {
				return usagef("an image cannot be read from the standard input; name a file")
			}
			if err := checkFormat(format, "auto"); err != nil {
				return err
			}
			return a.importImage(c.Context(), args[0], format, addr)
		},
	}
	c.Flags().StringVar(&format, "format", "auto", "auto, raw or qcow2")
	return c
}

func (a *app) importImage(ctx context.Context, file, format string, addr datastore.Address) error {
	img, err := inspectImage(ctx, file, format)
	if err != nil {
		return err
	}
	size := (img.VirtualSize + 511) / 512 * 512
	if err := checkDiskSize(size); err != nil {
		return err
	}
	return a.withMount(ctx, addr.LUN, func(ds *datastore.Datastore) error {
		return a.importInto(ctx, ds, addr, img, file, size)
	})
}

// importInto fills a disk of another name and renames it when it is whole, so that
// nobody takes a half one for the image.
func (a *app) importInto(ctx context.Context, ds *datastore.Datastore, addr datastore.Address, img image, file string, size int64) error {
	if _, err := ds.Volume().Lookup(ctx, addr.Path); !errors.Is(err, vmfs.ErrNotFound) {
		return errors.Join(err, fmt.Errorf("%s: %w", addr.Path, vmfs.ErrExists))
	}
	dir, name := path.Split("/" + strings.Trim(addr.Path, "/"))
	partial := fmt.Sprintf("%s.%s.import-%08x", dir, shorten(name), rand.Uint32())
	if err := ds.CreateDisk(ctx, partial, size); err != nil {
		return err
	}
	err := a.serveFor(ctx, ds, partial, false, func(uri string) error {
		// The disk is new: what is not written reads as zeros.
		return a.qemuImg(ctx, "convert", "-n", "--target-is-zero", "-f", img.Format, "-O", "raw", fileArg(file), uri)
	})
	if err == nil {
		err = ds.Rename(ctx, partial, addr.Path)
	}
	if err != nil {
		err = errors.Join(err, ds.RemoveDisk(context.WithoutCancel(ctx), partial))
	}
	return err
}

// image is what qemu-img tells of an image file.
type image struct {
	Format         string `json:"format"`
	VirtualSize    int64  `json:"virtual-size"`
	Backing        string `json:"backing-filename"`
	FormatSpecific struct {
		Data struct {
			DataFile string `json:"data-file"`
		} `json:"data"`
	} `json:"format-specific"`
}

func inspectImage(ctx context.Context, file, format string) (image, error) {
	var img image
	if _, err := os.Stat(file); err != nil {
		return img, fmt.Errorf("%w: %w", vmfs.ErrNotFound, err)
	}
	argv := []string{"info", "--output=json"}
	if format != "auto" {
		argv = append(argv, "-f", format)
	}
	out, err := qemuImgOutput(ctx, append(argv, fileArg(file))...)
	if err != nil {
		return img, err
	}
	if err := json.Unmarshal(out, &img); err != nil {
		return img, fmt.Errorf("qemu-img info %s: %w", file, err)
	}
	if err := checkFormat(img.Format); err != nil {
		return img, err
	}
	if img.Backing != "" || img.FormatSpecific.Data.DataFile != "" {
		return img, fmt.Errorf("%s refers to another file (%s%s): flatten it first with qemu-img convert", file, img.Backing, img.FormatSpecific.Data.DataFile)
	}
	return img, nil
}

func (a *app) diskExport() *cobra.Command {
	var format string
	c := &cobra.Command{
		Use: "export LUN:/path[@SNAPSHOT] FILE", Short: "Copy a disk or snapshot to an image file", Args: args(2, 2),
		Long: `Copy a disk or snapshot to an image file, through qemu-img. Holes stay holes.
A disk that is in use is exported from a snapshot. The file appears when it is
whole; its format follows its name unless --format says otherwise.`,
		RunE: func(c *cobra.Command, args []string) error {
			addr, err := objectAddress(args[0])
			if err != nil {
				return err
			}
			if args[1] == "-" {
				return usagef("an image cannot be written to the standard output; name a file")
			}
			if format == "" {
				format = "raw"
				if strings.HasSuffix(args[1], ".qcow2") {
					format = "qcow2"
				}
			}
			if err := checkFormat(format); err != nil {
				return err
			}
			return a.writeFile(c.Context(), args[1], func(partial string) error {
				return a.exportImage(c.Context(), addr, partial, format)
			})
		},
	}
	c.Flags().StringVar(&format, "format", "", "raw or qcow2 (default: by the file's name, else raw)")
	return a.yesFlag(c)
}

func (a *app) exportImage(ctx context.Context, addr datastore.Address, file, format string) error {
	convert := func(uri string) error {
		return a.qemuImg(ctx, "convert", "-f", "raw", "-O", format, uri, fileArg(file))
	}
	r, err := store.AskHolder(ctx, addr.LUN, a.host(), a.clk, store.Request{Verb: store.VerbExport, Path: addr.Path, Name: addr.Snapshot})
	switch {
	case err == nil:
		return convert(r.NBD)
	case !errors.Is(err, store.ErrNoControl):
		return err
	}
	name := addr.Path
	if addr.Snapshot != "" {
		name += "@" + addr.Snapshot
	}
	return a.withMount(ctx, addr.LUN, func(ds *datastore.Datastore) error {
		return a.serveFor(ctx, ds, name, true, convert)
	})
}

// serveFor serves one disk or snapshot on a private socket while f runs.
func (a *app) serveFor(ctx context.Context, ds *datastore.Datastore, name string, readOnly bool, f func(uri string) error) error {
	dir, err := os.MkdirTemp("", "basalt-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	return store.ServeFor(ctx, ds, a.clk, a.log, filepath.Join(dir, "nbd.sock"), name, readOnly, f)
}

// fileArg keeps qemu-img from reading a file's name as an option or a protocol.
func fileArg(name string) string {
	if abs, err := filepath.Abs(name); err == nil {
		name = abs
	}
	return "file:" + name
}

// qemuImg runs qemu-img, with its progress on a terminal.
func (a *app) qemuImg(ctx context.Context, argv ...string) error {
	if isTerminal(a.err) {
		argv = append([]string{argv[0], "-p"}, argv[1:]...)
	}
	cmd := exec.CommandContext(ctx, "qemu-img", argv...)
	var errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = a.err, &errs
	return qemuImgError(cmd.Run(), errs.String())
}

func qemuImgOutput(ctx context.Context, argv ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "qemu-img", argv...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	return out, qemuImgError(err, errs.String())
}

func qemuImgError(err error, said string) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, exec.ErrNotFound):
		return fmt.Errorf("qemu-img is not installed; on Debian: apt-get install qemu-utils")
	case strings.Contains(said, "No space left on device"):
		return fmt.Errorf("%w: %s", vmfs.ErrNoSpace, strings.TrimSpace(said))
	}
	return fmt.Errorf("%w: %s", err, strings.TrimSpace(said))
}
