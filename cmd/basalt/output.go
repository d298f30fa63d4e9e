package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"basalt/block/filedev"
	"basalt/vmfs"
)

// writeFile has write fill a local file that appears under its name only when it is
// whole; what was there before is kept until then. It asks before it replaces a
// file, and refuses what is no regular file, and a LUN with a volume on it.
func (a *app) writeFile(ctx context.Context, file string, write func(partial string) error) error {
	target, err := a.mayReplace(ctx, file)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(target), "."+shorten(filepath.Base(target))+".partial-")
	if err != nil {
		return err
	}
	partial := f.Name()
	if err := f.Close(); err != nil {
		return err
	}
	err = write(partial)
	if err == nil {
		err = syncPath(partial)
	}
	if err == nil {
		err = os.Rename(partial, target)
	}
	if err != nil {
		return errors.Join(err, os.Remove(partial))
	}
	return syncPath(filepath.Dir(target))
}

// mayReplace gives the file that would be written, through symbolic links.
func (a *app) mayReplace(ctx context.Context, file string) (string, error) {
	fi, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return file, nil
	}
	if err != nil {
		return "", err
	}
	if !fi.Mode().IsRegular() {
		return "", usagef("%s is not a regular file; name a new file", file)
	}
	if isVolume(ctx, a, file) {
		return "", usagef("%s is a LUN with a volume on it and is not overwritten; name another file", file)
	}
	target, err := filepath.EvalSymlinks(file)
	if err != nil {
		return "", err
	}
	return target, a.confirm("overwrite %s", file)
}

// isVolume reports whether a file holds a volume, whole or damaged.
func isVolume(ctx context.Context, a *app, file string) bool {
	dev, err := filedev.Open(file, filedev.Options{ReadOnly: true})
	if err != nil {
		return false // too short, or of no use as a LUN
	}
	v, err := vmfs.View(ctx, dev, a.clk)
	if err != nil {
		_ = dev.Close() // it was opened for reading
		return !errors.Is(err, vmfs.ErrNotVolume)
	}
	_ = v.Close(ctx) // it was opened for reading
	return true
}

// syncPath makes a file, or a folder's names, durable.
func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", path, errors.Join(err, f.Close()))
	}
	return f.Close()
}

// shorten cuts a name so that a prefix and a suffix fit beside it.
func shorten(name string) string {
	const most = 200
	for len(name) > most {
		r := []rune(name)
		name = string(r[:len(r)-1])
	}
	return name
}
