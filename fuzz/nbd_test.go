package fuzz_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"basalt/internal/clock"
	"basalt/nbd"
	"basalt/nbd/wire"
)

func nbdRequest(cmd, flags uint16, off uint64, n uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, 0x25609513)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, 99)
	b = binary.BigEndian.AppendUint64(b, off)
	return binary.BigEndian.AppendUint32(b, n)
}

func nbdOption(opt uint32, data []byte) []byte {
	b := append([]byte{}, "IHAVEOPT"...)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func nbdString(s string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...)
}

// FuzzNBDDecode: each decoder refuses with ErrMalformed, or accepts what encodes
// to the same bytes.
func FuzzNBDDecode(f *testing.F) {
	f.Add([]byte{0, 0, 0, 3})
	f.Add(nbdOption(7, nil))
	f.Add(append(nbdString("vm1/d0"), 0, 1, 0, 3))
	f.Add(append(append(nbdString("d"), 0, 0, 0, 1), nbdString("base:allocation")...))
	f.Add(append(nbdString("d"), 255, 255, 255, 255))
	f.Add(nbdRequest(1, 1, 4096, 512))
	f.Fuzz(func(t *testing.T, b []byte) {
		check := func(what string, err error, again []byte) {
			t.Helper()
			switch {
			case err != nil && !errors.Is(err, wire.ErrMalformed):
				t.Errorf("%s: %v is not ErrMalformed", what, err)
			case err == nil && !bytes.Equal(again, b):
				t.Errorf("%s: %x encodes as %x", what, b, again)
			}
		}
		flags, err := wire.DecodeClientFlags(b)
		check("client flags", err, binary.BigEndian.AppendUint32(nil, uint32(flags)))

		h, err := wire.DecodeOptionHeader(b)
		again := nbdOption(uint32(h.Option), nil)
		binary.BigEndian.PutUint32(again[12:], h.LenBytes)
		check("option header", err, again)

		name, err := wire.DecodeName(b)
		check("name", err, []byte(name))

		info, err := wire.DecodeInfoRequest(b)
		again = binary.BigEndian.AppendUint16(nbdString(info.Name), uint16(len(info.Types)))
		for _, typ := range info.Types {
			again = binary.BigEndian.AppendUint16(again, uint16(typ))
		}
		check("info request", err, again)

		meta, err := wire.DecodeMetaRequest(b)
		again = binary.BigEndian.AppendUint32(nbdString(meta.Name), uint32(len(meta.Queries)))
		for _, q := range meta.Queries {
			again = append(again, nbdString(q)...)
		}
		check("meta request", err, again)

		q, err := wire.DecodeRequest(b)
		again = nbdRequest(uint16(q.Command), uint16(q.Flags), q.OffBytes, q.LenBytes)
		binary.BigEndian.PutUint64(again[8:], q.Cookie)
		check("request", err, again)
	})
}

// nbdZeros is an export that reads as zeros and checks what it is asked for.
type nbdZeros struct {
	t         *testing.T
	sizeBytes int64
}

func (z nbdZeros) List(context.Context) ([]string, error) { return []string{"d"}, nil }

func (z nbdZeros) Describe(_ context.Context, name string) (nbd.Info, error) {
	if name != "d" {
		return nbd.Info{}, nbd.ErrNotFound
	}
	return z.Info(), nil
}

func (z nbdZeros) Open(ctx context.Context, name string) (nbd.Export, error) {
	if _, err := z.Describe(ctx, name); err != nil {
		return nil, err
	}
	return z, nil
}

func (z nbdZeros) Info() nbd.Info {
	return nbd.Info{SizeBytes: z.sizeBytes, MinBlock: 512, FastZeroes: true}
}

func (z nbdZeros) within(offBytes, lenBytes int64) error {
	if offBytes < 0 || lenBytes <= 0 || lenBytes > z.sizeBytes-offBytes || (offBytes|lenBytes)%512 != 0 {
		z.t.Errorf("the export was asked for %d bytes at %d", lenBytes, offBytes)
	}
	return nil
}

func (z nbdZeros) ReadAt(_ context.Context, p []byte, offBytes int64) error {
	clear(p)
	return z.within(offBytes, int64(len(p)))
}

func (z nbdZeros) WriteAt(_ context.Context, p []byte, offBytes int64) error {
	return z.within(offBytes, int64(len(p)))
}

func (z nbdZeros) WriteFUA(_ context.Context, p []byte, offBytes int64) error {
	return z.within(offBytes, int64(len(p)))
}

func (z nbdZeros) Trim(_ context.Context, offBytes, lenBytes int64) error {
	return z.within(offBytes, lenBytes)
}

func (z nbdZeros) WriteZeroes(_ context.Context, offBytes, lenBytes int64, _ nbd.ZeroOptions) error {
	return z.within(offBytes, lenBytes)
}

func (z nbdZeros) BlockStatus(_ context.Context, offBytes, lenBytes int64, emit func(nbd.Extent) bool) error {
	emit(nbd.Extent{LenBytes: lenBytes, Hole: true, Zero: true})
	return z.within(offBytes, lenBytes)
}

func (z nbdZeros) Flush(context.Context) error { return nil }
func (z nbdZeros) Close() error                { return nil }

// FuzzNBDConnection: whatever a client says, its connection ends once it has
// fallen silent, and the export sees only requests within its bounds.
func FuzzNBDConnection(f *testing.F) {
	hello := []byte{0, 0, 0, 3}
	enter := append(append([]byte{}, hello...), nbdOption(8, nil)...)
	enter = append(enter, nbdOption(10, append(append(nbdString("d"), 0, 0, 0, 1), nbdString("base:allocation")...))...)
	enter = append(enter, nbdOption(7, append(nbdString("d"), 0, 1, 0, 3))...)
	all := append([]byte{}, enter...)
	for cmd := uint16(0); cmd < 9; cmd++ {
		all = append(all, nbdRequest(cmd, cmd%2, 512, 512)...)
		if cmd == 1 {
			all = append(all, make([]byte, 512)...)
		}
	}
	f.Add(all)
	f.Add(append(append([]byte{}, enter...), nbdRequest(1, 0, 0, 33<<20)...))
	f.Add(append(append([]byte{}, enter...), nbdRequest(0, 4, 0, 1<<20)...))
	f.Add(append(append([]byte{}, hello...), nbdOption(1, []byte("d"))...))
	f.Add(append(append([]byte{}, hello...), nbdOption(3, nil)...))
	f.Fuzz(func(t *testing.T, said []byte) {
		s, err := nbd.New(nbdZeros{t: t, sizeBytes: 1 << 20}, clock.System{}, slog.New(slog.NewTextHandler(io.Discard, nil)), nbd.Options{})
		if err != nil {
			t.Fatal(err)
		}
		server, client := net.Pipe()
		if err := client.SetDeadline(clock.System{}.Wall().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			// How it ends is the fuzzer's choice; that it ends is the claim.
			_ = s.ServeConn(context.Background(), server)
		}()
		taken := make(chan struct{})
		go func() {
			defer close(taken)
			_, _ = io.Copy(io.Discard, client)
		}()
		_, _ = client.Write(said) // fails once the server has closed
		if err := client.Close(); err != nil {
			t.Fatal(err)
		}
		<-taken
		timer := clock.System{}.NewTimer(10 * time.Second)
		defer timer.Stop()
		select {
		case <-ended:
		case <-timer.C:
			t.Fatal("the connection did not end")
		}
	})
}
