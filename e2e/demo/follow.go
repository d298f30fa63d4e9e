package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// follower reads a file line by line while another process writes it. The writer
// has a file and no pipe, so that it can outlive its reader.
type follower struct {
	file   *os.File
	notify *os.File // inotify
	rest   []byte   // read and not yet handed out
}

// follow reads path, which exists, from its start.
func follow(path string) (*follower, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, err
	}
	notify := os.NewFile(uintptr(fd), "inotify")
	// Watched before it is first read, so that no line falls in between.
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_MODIFY); err != nil {
		return nil, errors.Join(&os.PathError{Op: "watch", Path: path, Err: err}, notify.Close())
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, errors.Join(err, notify.Close())
	}
	return &follower{file: file, notify: notify}, nil
}

// Next returns the next whole line without its end. When ctx ends it gives what is
// there already, then ctx's cause.
func (f *follower) Next(ctx context.Context) (string, error) {
	for {
		if line, rest, ok := bytes.Cut(f.rest, []byte("\n")); ok {
			f.rest = rest
			return string(line), nil
		}
		ended := ctx.Err() != nil // asked before the read: what came until then is read
		n, err := f.fill()
		switch {
		case err != nil:
			return "", err
		case n > 0:
		case ended:
			return "", context.Cause(ctx)
		default:
			if err := f.await(ctx); err != nil {
				return "", err
			}
		}
	}
}

func (f *follower) fill() (int, error) {
	buf := make([]byte, 4096)
	n, err := f.file.Read(buf)
	f.rest = append(f.rest, buf[:n]...)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

// await returns when the file may have grown or ctx has ended.
func (f *follower) await(ctx context.Context) error {
	if err := f.notify.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() {
		_ = f.notify.SetReadDeadline(time.Unix(0, 1)) // fails only once closed
	})
	defer stop()
	var events [4096]byte
	_, err := f.notify.Read(events[:])
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = nil
	}
	return err
}

// Close ends the reading.
func (f *follower) Close() error { return errors.Join(f.notify.Close(), f.file.Close()) }
