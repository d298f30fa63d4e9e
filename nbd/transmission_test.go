package nbd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"reflect"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"

	"basalt/block"
	"basalt/internal/clock"
	"basalt/nbd"
	"basalt/nbd/wire"
)

func randomBytes(n int) []byte {
	r := rand.NewChaCha8([32]byte{1})
	b := make([]byte, n)
	_, _ = r.Read(b) // never fails
	return b
}

func TestWrittenBytesReadBack(t *testing.T) {
	t.Parallel()
	path := listen(t, one(newDisk(80<<20)), nbd.Options{})
	want := randomBytes(32 << 20)
	for _, structured := range []bool{false, true} {
		c := connectSimple(t, path)
		if structured {
			c = connect(t, path)
		}
		for i, n := range []int{1, 511, 4096, 4097, 1 << 20, 32 << 20} {
			off := uint64(i * 12345)
			c.mustDo(wire.Request{Command: wire.CmdWrite, OffBytes: off, LenBytes: uint32(n)}, want[:n])
			got := c.mustDo(wire.Request{Command: wire.CmdRead, OffBytes: off, LenBytes: uint32(n)}, nil).Data
			if structured {
				if binary.BigEndian.Uint64(got) != off {
					t.Fatalf("chunk at %x, want %d", got[:8], off)
				}
				got = got[8:]
			}
			if !bytes.Equal(got, want[:n]) {
				t.Errorf("structured %v: %d bytes at %d differ", structured, n, off)
			}
		}
	}
}

func TestZerosTravelAsAHoleUnlessOnePieceIsWanted(t *testing.T) {
	t.Parallel()
	d := newDisk(16384)
	d.data[8191] = 1
	c := connect(t, listen(t, one(d), nbd.Options{}))
	at := func(off uint64, data ...byte) []byte {
		return append(binary.BigEndian.AppendUint64(nil, off), data...)
	}
	for _, test := range []struct {
		q    wire.Request
		want reply
	}{
		{wire.Request{OffBytes: 0, LenBytes: 8191}, reply{Chunk: 2, Data: at(0, 0, 0, 0x1f, 0xff)}},
		{wire.Request{OffBytes: 8192, LenBytes: 3}, reply{Chunk: 2, Data: at(8192, 0, 0, 0, 3)}},
		{wire.Request{OffBytes: 0, LenBytes: 8192}, reply{Chunk: 1, Data: at(0, d.data[:8192]...)}},
		{wire.Request{OffBytes: 8190, LenBytes: 2}, reply{Chunk: 1, Data: at(8190, 0, 1)}},
		{wire.Request{OffBytes: 0, LenBytes: 4096, Flags: wire.CmdFlagDF}, reply{Chunk: 1, Data: at(0, d.data[:4096]...)}},
		{wire.Request{OffBytes: 99, LenBytes: 0}, reply{Chunk: 0, Data: []byte{}}},
	} {
		if got := c.do(test.q, nil); !reflect.DeepEqual(got, test.want) {
			t.Errorf("%+v: chunk %d of %d bytes, want chunk %d of %d", test.q, got.Chunk, len(got.Data), test.want.Chunk, len(test.want.Data))
		}
	}
}

func TestDurabilityIsWhatTheClientAskedFor(t *testing.T) {
	t.Parallel()
	d := newDisk(32768)
	c := connect(t, listen(t, one(d), nbd.Options{}))
	durable := func(off int) byte {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.durable[off]
	}
	ones := bytes.Repeat([]byte{1}, 4096)
	c.mustDo(wire.Request{Command: wire.CmdWrite, LenBytes: 4096}, ones)
	if durable(0) != 0 {
		t.Error("a plain write was made durable")
	}
	c.mustDo(wire.Request{Command: wire.CmdWrite, Flags: wire.CmdFlagFUA, OffBytes: 4096, LenBytes: 4096}, ones)
	if durable(4096) != 1 || durable(0) != 0 {
		t.Error("FUA is about the write itself, and no other")
	}
	// A flush ignores its offset and length.
	c.mustDo(wire.Request{Command: wire.CmdFlush, OffBytes: 1 << 60, LenBytes: 5}, nil)
	if durable(0) != 1 {
		t.Error("a flush did not make the write durable")
	}
	c.mustDo(wire.Request{Command: wire.CmdTrim, LenBytes: 4096}, nil)
	if durable(0) != 1 {
		t.Error("a plain trim was made durable")
	}
	c.mustDo(wire.Request{Command: wire.CmdTrim, Flags: wire.CmdFlagFUA, OffBytes: 4096, LenBytes: 4096}, nil)
	if durable(4096) != 0 {
		t.Error("a trim with FUA is not durable")
	}
	c.mustDo(wire.Request{Command: wire.CmdCache, LenBytes: 32768}, nil)
	want := []string{"write", "write fua", "flush", "trim", "trim", "flush"}
	if got := d.did(); !slices.Equal(got, want) {
		t.Errorf("the export did %q, want %q", got, want)
	}
}

func TestWriteZeroesPassesItsFlagsOn(t *testing.T) {
	t.Parallel()
	d := newDisk(8192)
	d.info.FastZeroes = true
	d.before = func(_ context.Context, op string, _ int64) error {
		if op == fmt.Sprintf("zero %+v", nbd.ZeroOptions{NoHole: true, Fast: true}) {
			return nbd.ErrNotSupported
		}
		return nil
	}
	c := connect(t, listen(t, one(d), nbd.Options{}))
	for _, test := range []struct {
		flags wire.CommandFlags
		want  nbd.ZeroOptions
		errno wire.Errno
	}{
		{0, nbd.ZeroOptions{}, wire.OK},
		{wire.CmdFlagFUA, nbd.ZeroOptions{FUA: true}, wire.OK},
		{wire.CmdFlagNoHole, nbd.ZeroOptions{NoHole: true}, wire.OK},
		{wire.CmdFlagFastZero, nbd.ZeroOptions{Fast: true}, wire.OK},
		{wire.CmdFlagFastZero | wire.CmdFlagNoHole, nbd.ZeroOptions{NoHole: true, Fast: true}, wire.ENOTSUP},
	} {
		got := c.do(wire.Request{Command: wire.CmdWriteZeroes, Flags: test.flags, LenBytes: 8192}, nil)
		ops := d.did()
		if last := ops[len(ops)-1]; got.Errno != test.errno || last != fmt.Sprintf("zero %+v", test.want) {
			t.Errorf("flags %#x: error %d after %q, want %d after %+v", test.flags, got.Errno, last, test.errno, test.want)
		}
	}
}

func TestSenselessRequestsAreRefusedAndTheConnectionGoesOn(t *testing.T) {
	t.Parallel()
	const size = 4 << 20
	d := newDisk(size)
	d.info.MinBlock, d.info.MaxBlock = 512, 1<<20
	readOnly := newDisk(size)
	readOnly.info.ReadOnly = true
	path := listen(t, one(d), nbd.Options{})
	readOnlyPath := listen(t, one(readOnly), nbd.Options{})
	const read, write, trim, zero, status = wire.CmdRead, wire.CmdWrite, wire.CmdTrim, wire.CmdWriteZeroes, wire.CmdBlockStatus
	for _, test := range []struct {
		name string
		path string
		q    wire.Request
		want wire.Errno
	}{
		{"read across the end", path, wire.Request{Command: read, OffBytes: size - 512, LenBytes: 1024}, wire.EINVAL},
		{"read at an offset that wraps", path, wire.Request{Command: read, OffBytes: 1<<64 - 512, LenBytes: 1024}, wire.EINVAL},
		{"write across the end", path, wire.Request{Command: write, OffBytes: size - 512, LenBytes: 1024}, wire.ENOSPC},
		{"write at the top of the range", path, wire.Request{Command: write, OffBytes: 1 << 63, LenBytes: 512}, wire.ENOSPC},
		{"zeroes across the end", path, wire.Request{Command: zero, LenBytes: size + 512}, wire.ENOSPC},
		{"trim across the end", path, wire.Request{Command: trim, LenBytes: 1<<32 - 512}, wire.EINVAL},
		{"status across the end", path, wire.Request{Command: status, OffBytes: size, LenBytes: 512}, wire.EINVAL},
		{"status of nothing", path, wire.Request{Command: status}, wire.EINVAL},
		{"read of part of a block", path, wire.Request{Command: read, LenBytes: 511}, wire.EINVAL},
		{"write between blocks", path, wire.Request{Command: write, OffBytes: 256, LenBytes: 512}, wire.EINVAL},
		{"trim between blocks", path, wire.Request{Command: trim, OffBytes: 1, LenBytes: 512}, wire.EINVAL},
		{"read above the maximum", path, wire.Request{Command: read, LenBytes: 1<<20 + 512}, wire.EINVAL},
		{"read of 4 GiB", path, wire.Request{Command: read, LenBytes: 1<<32 - 512}, wire.EINVAL},
		{"one piece above the maximum", path, wire.Request{Command: read, Flags: wire.CmdFlagDF, LenBytes: 1<<20 + 512}, wire.EOVERFLOW},
		{"write above the maximum", path, wire.Request{Command: write, LenBytes: 1<<20 + 512}, wire.EINVAL},
		{"write above any maximum", path, wire.Request{Command: write, LenBytes: 33 << 20}, wire.EINVAL},
		{"unknown command", path, wire.Request{Command: 99}, wire.EINVAL},
		{"unknown flag", path, wire.Request{Command: read, Flags: 1 << 9, LenBytes: 512}, wire.EINVAL},
		{"unknown flag of a write", path, wire.Request{Command: write, Flags: wire.CmdFlagNoHole, LenBytes: 512}, wire.EINVAL},
		{"fast zeroes that were not offered", path, wire.Request{Command: zero, Flags: wire.CmdFlagFastZero, LenBytes: 512}, wire.EINVAL},
		{"write to a read-only export", readOnlyPath, wire.Request{Command: write, LenBytes: 512}, wire.EPERM},
		{"trim of a read-only export", readOnlyPath, wire.Request{Command: trim, LenBytes: 512}, wire.EPERM},
		{"zeroes to a read-only export", readOnlyPath, wire.Request{Command: zero, LenBytes: 512}, wire.EPERM},
		// With no effect, but no error either.
		{"FUA where it means nothing", path, wire.Request{Command: read, Flags: wire.CmdFlagFUA, LenBytes: 512}, wire.OK},
		{"write of nothing", path, wire.Request{Command: write, OffBytes: size}, wire.OK},
		{"zeroes of nothing", path, wire.Request{Command: zero}, wire.OK},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, connect := range []func(testing.TB, string) *client{connect, connectSimple} {
				c := connect(t, test.path)
				if !c.structured && test.q.Flags&wire.CmdFlagDF != 0 {
					test.want = wire.EINVAL // the flag was not offered
				}
				var payload []byte
				if test.q.Command == write {
					payload = bytes.Repeat([]byte{7}, int(test.q.LenBytes))
				}
				test.q.Cookie = 41
				if got := c.do(test.q, payload); got.Errno != test.want {
					t.Errorf("structured %v: error %d %q, want %d", c.structured, got.Errno, got.Data, test.want)
				}
				c.mustDo(wire.Request{Command: wire.CmdFlush, Cookie: 42}, nil)
			}
		})
	}
	for _, d := range []*disk{d, readOnly} {
		if i := slices.Index(d.data, 7); i >= 0 {
			t.Errorf("a refused write changed byte %d", i)
		}
	}
}

func TestHostileRequestsEndTheConnection(t *testing.T) {
	t.Parallel()
	path := listen(t, one(newDisk(8192)), nbd.Options{})
	for name, b := range map[string][]byte{
		"wrong magic":        make([]byte, wire.RequestSize),
		"write of 4 GiB":     requestBytes(wire.Request{Command: wire.CmdWrite, LenBytes: 1<<32 - 1}),
		"orderly disconnect": requestBytes(wire.Request{Command: wire.CmdDisconnect}),
	} {
		t.Run(name, func(t *testing.T) {
			c := connect(t, path)
			c.write(b)
			c.wantEnd()
		})
	}
}

func TestExportErrorsBecomeErrorNumbers(t *testing.T) {
	t.Parallel()
	var fail atomic.Pointer[error]
	d := newDisk(8192)
	d.before = func(context.Context, string, int64) error { return *fail.Load() }
	path := listen(t, one(d), nbd.Options{})
	for _, test := range []struct {
		err  error
		want wire.Errno
	}{
		{nbd.ErrNoSpace, wire.ENOSPC},
		{block.ErrNoSpace, wire.ENOSPC},
		{nbd.ErrReadOnly, wire.EPERM},
		{nbd.ErrInvalid, wire.EINVAL},
		{&block.RangeError{Err: block.ErrMisaligned}, wire.EINVAL},
		{block.ErrNotSupported, wire.EINVAL}, // ENOTSUP is for a fast write-zeroes alone
		{&block.CorruptError{Object: "tree node"}, wire.EIO},
		{context.DeadlineExceeded, wire.EIO},
		{errors.New("bad \xff\x00 text"), wire.EIO},
	} {
		err := fmt.Errorf("disk: %w", test.err)
		fail.Store(&err)
		for _, c := range []*client{connect(t, path), connectSimple(t, path)} {
			for _, cmd := range []wire.Command{wire.CmdRead, wire.CmdWrite, wire.CmdFlush, wire.CmdTrim, wire.CmdWriteZeroes, wire.CmdBlockStatus} {
				if cmd == wire.CmdBlockStatus && !c.structured {
					continue
				}
				var payload []byte
				if cmd == wire.CmdWrite {
					payload = make([]byte, 512)
				}
				got := c.do(wire.Request{Command: cmd, LenBytes: 512, Cookie: 9}, payload)
				if got.Errno != test.want {
					t.Errorf("%v of command %d: error %d, want %d", err, cmd, got.Errno, test.want)
				}
				if c.structured && !wire.IsString(string(got.Data)) {
					t.Errorf("message %q is no string of the protocol", got.Data)
				}
			}
		}
	}
}

func TestBlockStatusMergesAndClips(t *testing.T) {
	t.Parallel()
	d := newDisk(1 << 20)
	d.extents = []nbd.Extent{
		{LenBytes: 4096}, {LenBytes: 4096},
		{LenBytes: 8192, Hole: true, Zero: true}, {LenBytes: 4096, Hole: true, Zero: true},
		{LenBytes: 4096, Zero: true},
		{LenBytes: 1 << 20, Hole: true},
	}
	c := connect(t, listen(t, one(d), nbd.Options{}))
	for _, test := range []struct {
		off, n uint32
		flags  wire.CommandFlags
		want   []uint32 // length and flags, in turn
	}{
		{0, 1 << 20, 0, []uint32{8192, 0, 12288, 3, 4096, 2, 1<<20 - 24576, 1}},
		{4096, 8192, 0, []uint32{4096, 0, 4096, 3}},
		{0, 1 << 20, wire.CmdFlagReqOne, []uint32{8192, 0}},
		{8192, 4096, wire.CmdFlagReqOne, []uint32{4096, 3}},
		{24576, 512, 0, []uint32{512, 1}},
	} {
		got := c.mustDo(wire.Request{Command: wire.CmdBlockStatus, Flags: test.flags, OffBytes: uint64(test.off), LenBytes: test.n}, nil)
		want := binary.BigEndian.AppendUint32(nil, 1)
		for _, v := range test.want {
			want = binary.BigEndian.AppendUint32(want, v)
		}
		if got.Chunk != 5 || !bytes.Equal(got.Data, want) {
			t.Errorf("%d bytes at %d, flags %#x: got %x, want %x", test.n, test.off, test.flags, got.Data, want)
		}
	}
}

func TestBlockStatusOfManyExtentsIsCut(t *testing.T) {
	t.Parallel()
	d := newDisk(8 << 20)
	for i := range 16384 {
		d.extents = append(d.extents, nbd.Extent{LenBytes: 512, Hole: i%2 == 0, Zero: i%2 == 0})
	}
	c := connect(t, listen(t, one(d), nbd.Options{}))
	got := c.mustDo(wire.Request{Command: wire.CmdBlockStatus, LenBytes: 8 << 20}, nil).Data
	if len(got) != 4+4096*8 {
		t.Errorf("%d bytes of extents", len(got))
	}
}

func TestBlockStatusWithoutAnExtentIsAnError(t *testing.T) {
	t.Parallel()
	for _, extents := range [][]nbd.Extent{{}, {{LenBytes: -1}}, {{LenBytes: 512}, {LenBytes: -512}}} {
		d := newDisk(8192)
		d.extents = extents
		c := connect(t, listen(t, one(d), nbd.Options{}))
		if got := c.do(wire.Request{Command: wire.CmdBlockStatus, LenBytes: 8192}, nil); got.Errno != wire.EIO {
			t.Errorf("%v: error %d, want EIO", extents, got.Errno)
		}
	}
}

// A lost export must not be answered for: another host may own it by now, and an
// error would tell the guest that its write did not happen.
func TestLostExportIsNotAnsweredFor(t *testing.T) {
	t.Parallel()
	for _, lost := range []error{nbd.ErrLost, block.ErrFenced} {
		d := newDisk(8192)
		d.before = func(_ context.Context, op string, _ int64) error {
			if op == "write" {
				return fmt.Errorf("gate: %w", lost)
			}
			return nil
		}
		c := connect(t, listen(t, one(d), nbd.Options{}))
		c.send(wire.Request{Command: wire.CmdWrite, LenBytes: 512}, make([]byte, 512))
		c.wantEnd()
	}
}

func TestSlowRequestsDoNotHoldUpOthers(t *testing.T) {
	t.Parallel()
	d := newDisk(1 << 20)
	release := make(chan struct{})
	d.before = func(_ context.Context, op string, _ int64) error {
		if op == "flush" {
			<-release
		}
		return nil
	}
	c := connect(t, listen(t, one(d), nbd.Options{Workers: 4}))
	for i := range 3 {
		c.send(wire.Request{Command: wire.CmdFlush, Cookie: uint64(100 + i)}, nil)
	}
	for i := range 200 {
		c.mustDo(wire.Request{Command: wire.CmdWrite, Cookie: uint64(1000 + i), LenBytes: 4096}, make([]byte, 4096))
	}
	close(release)
	for range 3 {
		if r := c.reply(); r.Errno != 0 || r.Cookie < 100 || r.Cookie > 102 {
			t.Errorf("reply %+v", r)
		}
	}
	d.look(func() {
		if d.peak > 4 {
			t.Errorf("%d requests at once, want at most 4", d.peak)
		}
	})
}

// The budget: a client that takes no replies stops being read.
func TestClientThatTakesNoRepliesIsBounded(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ lenBytes, requests, limit int }{
		{1 << 20, 150, 64},
		{32 << 20, 5, 2},
		{4096, 1000, 128},
	} {
		var started atomic.Int64
		d := newDisk(32 << 20)
		d.data[0] = 1 // not a hole
		d.before = func(context.Context, string, int64) error { started.Add(1); return nil }
		s := newServer(t, one(d), nbd.Options{})
		server, nc := net.Pipe()
		ended := make(chan error, 1)
		go func() { ended <- s.ServeConn(t.Context(), server) }()
		c := newClient(t, nc)
		c.hello(3)
		c.mustGo("d")
		var all []byte
		for i := range test.requests {
			q := wire.Request{Cookie: uint64(i), LenBytes: uint32(test.lenBytes)}
			c.readBytes[q.Cookie] = q.LenBytes
			all = append(all, requestBytes(q)...)
		}
		c.write(all) // the server reads it into its buffer at once
		for started.Load() < int64(test.limit) {
			runtime.Gosched()
		}
		timer := clock.System{}.NewTimer(grace)
		<-timer.C
		seen := make([]bool, test.requests)
		for taken := range test.requests {
			// A pipe has no buffer, so what was not taken here is still in flight.
			if n := started.Load(); n > int64(taken+test.limit) {
				t.Fatalf("%d reads of %d bytes were begun after %d were taken", n, test.lenBytes, taken)
			}
			r := c.reply()
			if r.Errno != wire.OK || seen[r.Cookie] || !bytes.Equal(r.Data, d.data[:test.lenBytes]) {
				t.Fatalf("reply %d: error %d, %d bytes, seen %v", r.Cookie, r.Errno, len(r.Data), seen[r.Cookie])
			}
			seen[r.Cookie] = true
		}
		nc.Close()
		if err := within(t, "the end", ended); err != nil {
			t.Errorf("ServeConn: %v", err)
		}
	}
}
