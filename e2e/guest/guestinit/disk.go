package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"basalt/e2e/guest"
	"basalt/internal/clock"
)

type disk struct {
	f   *os.File
	buf []byte // one record, page-aligned as O_DIRECT wants it
}

// ring is where a disk's records stand.
type ring struct {
	layout guest.Layout
	run    guest.RunID
	last   uint64
}

func openDisk(ctx context.Context, clk clock.Clock, path string) (*disk, error) {
	deadline := clk.Now().Add(diskWait)
	for {
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
		if err == nil {
			buf, err := unix.Mmap(-1, 0, guest.RecordBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
			if err != nil {
				return nil, errors.Join(err, f.Close())
			}
			return &disk{f: f, buf: buf}, nil
		}
		if !errors.Is(err, os.ErrNotExist) || clk.Now() > deadline {
			return nil, err
		}
		if !pause(ctx, clk, 10*time.Millisecond) {
			return nil, ctx.Err()
		}
	}
}

func (d *disk) Close() error { return errors.Join(unix.Munmap(d.buf), d.f.Close()) }

// ReadAt reads through the aligned buffer, one record at a time.
func (d *disk) ReadAt(b []byte, offBytes int64) (int, error) {
	if len(b) != len(d.buf) {
		return 0, fmt.Errorf("read of %d bytes: %w", len(b), unix.EINVAL)
	}
	n, err := d.f.ReadAt(d.buf, offBytes)
	return copy(b, d.buf[:n]), err
}

func (d *disk) verify(opts guest.Options) (ring, error) {
	rep, err := guest.Verify(d, opts.Acked)
	if err != nil {
		return ring{}, err
	}
	for _, b := range rep.Bad {
		say(guest.Line{Kind: guest.LineBad, Seq: b.Seq, Block: b.Block, Text: b.Reason})
	}
	if !rep.OK() {
		return ring{}, fmt.Errorf("%d bad records", rep.BadCount)
	}
	say(guest.Line{Kind: guest.LineVerified, Seq: rep.Last, Torn: rep.Torn})
	r := ring{layout: guest.Layout{Blocks: rep.Blocks}, run: rep.Run, last: rep.Last}
	if rep.Blocks > 0 {
		return r, nil
	}
	r.run = opts.Run
	if r.run == (guest.RunID{}) {
		rand.Read(r.run[:])
	}
	sizeBytes, err := d.f.Seek(0, io.SeekEnd)
	if err != nil {
		return ring{}, err
	}
	r.layout.Blocks = min(opts.Blocks, uint64(sizeBytes)/guest.RecordBytes) &^ 1
	return r, r.layout.Validate()
}

// write appends records until it wrote opts.Count or ctx ends.
func (d *disk) write(ctx context.Context, clk clock.Clock, r ring, opts guest.Options) error {
	for n := uint64(0); opts.Count == 0 || n < opts.Count; n++ {
		if ctx.Err() != nil {
			return nil
		}
		seq := r.last + 1
		rec := guest.Record{Seq: seq, Run: r.run, Block: r.layout.BlockOf(seq), Blocks: r.layout.Blocks}
		rec.EncodeInto(d.buf)
		began := clk.Now()
		if _, err := d.f.WriteAt(d.buf, int64(rec.Block)*guest.RecordBytes); err != nil {
			return fmt.Errorf("write record %d: %w", seq, err)
		}
		if err := unix.Fdatasync(int(d.f.Fd())); err != nil {
			return fmt.Errorf("sync record %d: %w", seq, err)
		}
		r.last = seq
		say(guest.Line{Kind: guest.LineAck, Seq: seq, Latency: clk.Now().Sub(began)})
		if opts.Delay > 0 {
			pause(ctx, clk, opts.Delay)
		}
	}
	return nil
}

// pause returns false when ctx ended first.
func pause(ctx context.Context, clk clock.Clock, d time.Duration) bool {
	t := clk.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
