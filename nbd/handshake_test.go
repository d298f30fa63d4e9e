package nbd_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"basalt/internal/clock"
	"basalt/nbd"
	"basalt/nbd/wire"
)

const (
	flagsWritable = 1<<0 | 1<<2 | 1<<3 | 1<<5 | 1<<6 | 1<<8 | 1<<10
	flagsReadOnly = 1<<0 | 1<<1 | 1<<2 | 1<<3 | 1<<8 | 1<<10
	flagDF        = 1 << 7
	flagFastZero  = 1 << 11
)

func infoExport(size uint64, flags uint16) string {
	b := binary.BigEndian.AppendUint64([]byte{0, 0}, size)
	return string(binary.BigEndian.AppendUint16(b, flags))
}

func infoBlockSize(minimum, preferred, maximum uint32) string {
	b := binary.BigEndian.AppendUint32([]byte{0, 3}, minimum)
	b = binary.BigEndian.AppendUint32(b, preferred)
	return string(binary.BigEndian.AppendUint32(b, maximum))
}

func TestExportNameAnswersWithPaddingUnlessDeclined(t *testing.T) {
	t.Parallel()
	path := listen(t, one(newDisk(8192)), nbd.Options{})
	for flags, padding := range map[uint32]int{0: 124, 1: 124, 3: 0, 2: 0} {
		c := dial(t, path)
		c.hello(flags)
		c.write(optionHeader(wire.OptExportName, 1), []byte("d"))
		want := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint64(nil, 8192), flagsWritable)
		want = append(want, make([]byte, padding)...)
		if got := c.read(len(want)); !bytes.Equal(got, want) {
			t.Errorf("client flags %d: got %x, want %x", flags, got, want)
		}
		c.mustDo(wire.Request{Command: wire.CmdFlush, Cookie: 7}, nil) // nothing in between
	}
}

func TestExportNameOfNoExportEndsTheSession(t *testing.T) {
	t.Parallel()
	path := listen(t, one(newDisk(8192)), nbd.Options{})
	c := dial(t, path)
	c.hello(3)
	c.write(optionHeader(wire.OptExportName, 1), []byte("x"))
	c.wantEnd()
}

func TestGoTellsWhatTheExportIs(t *testing.T) {
	t.Parallel()
	plain, full := newDisk(8192), newDisk(8192)
	full.info.MinBlock, full.info.PreferredBlock, full.info.MaxBlock = 4096, 65536, 1<<20
	full.info.FastZeroes, full.info.Description = true, "a disk"
	readOnly := newDisk(512)
	readOnly.info.ReadOnly = true
	path := listen(t, &disks{byName: map[string]*disk{"": plain, "full": full, "ro": readOnly}}, nbd.Options{})

	asked := []wire.InfoType{wire.InfoName, wire.InfoDescription, wire.InfoBlockSize, 77}
	ack := optionReply{Type: wire.RepAck}
	for name, want := range map[string][]optionReply{
		"": {
			{wire.RepInfo, infoExport(8192, flagsWritable|flagDF)},
			{wire.RepInfo, infoBlockSize(1, 4096, 32<<20)},
			{wire.RepInfo, "\x00\x01"}, ack},
		"full": {
			{wire.RepInfo, infoExport(8192, flagsWritable|flagDF|flagFastZero)},
			{wire.RepInfo, infoBlockSize(4096, 65536, 1<<20)},
			{wire.RepInfo, "\x00\x01full"}, {wire.RepInfo, "\x00\x02a disk"}, ack},
		"ro": {
			{wire.RepInfo, infoExport(512, flagsReadOnly|flagDF)},
			{wire.RepInfo, infoBlockSize(1, 4096, 32<<20)},
			{wire.RepInfo, "\x00\x01ro"}, ack},
	} {
		c := dial(t, path)
		c.hello(3)
		c.structure()
		for _, opt := range []wire.Option{wire.OptInfo, wire.OptGo} {
			if got := c.option(opt, infoData(name, asked...)); !reflect.DeepEqual(got, want) {
				t.Errorf("option %d of %q:\n got %+v\nwant %+v", opt, name, got, want)
			}
		}
		c.mustDo(wire.Request{Command: wire.CmdFlush}, nil)
	}
}

func TestInfoDoesNotOpenTheExport(t *testing.T) {
	t.Parallel()
	d := newDisk(8192)
	c := dial(t, listen(t, one(d), nbd.Options{}))
	c.hello(3)
	c.option(wire.OptInfo, infoData("d"))
	d.look(func() {
		if d.opens != 0 {
			t.Errorf("opened %d times", d.opens)
		}
	})
	// Without structured replies there is no DF to offer.
	if got, want := c.mustGo("d")[0].Data, infoExport(8192, flagsWritable); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestRefusedOptionsLeaveTheHandshakeGoing(t *testing.T) {
	t.Parallel()
	exports := one(newDisk(8192))
	broken := newDisk(8192)
	broken.info.MinBlock = 3
	exports.byName["broken"] = broken
	exports.failing = map[string]error{
		"held":   errors.New("held by host b"),
		"ending": nbd.ErrShutdown,
	}
	c := dial(t, listen(t, exports, nbd.Options{}))
	c.hello(3)
	long := strings.Repeat("n", 4097)
	for _, test := range []struct {
		name string
		opt  wire.Option
		data []byte
		want wire.OptionReply
		text string
	}{
		{"unknown option", 99, []byte("what"), wire.RepErrUnsupported, ""},
		{"tls", wire.OptStartTLS, nil, wire.RepErrUnsupported, ""},
		{"list with data", wire.OptList, []byte{0}, wire.RepErrInvalid, ""},
		{"structured reply with data", wire.OptStructuredReply, []byte{0}, wire.RepErrInvalid, ""},
		{"no such export", wire.OptGo, infoData("x"), wire.RepErrUnknown, "no such export"},
		{"no such export to describe", wire.OptInfo, infoData("x"), wire.RepErrUnknown, ""},
		{"held elsewhere", wire.OptGo, infoData("held"), wire.RepErrPolicy, "held by host b"},
		{"shutting down", wire.OptGo, infoData("ending"), wire.RepErrShutdown, ""},
		{"export with senseless blocks", wire.OptGo, infoData("broken"), wire.RepErrPolicy, ""},
		{"no data", wire.OptGo, nil, wire.RepErrInvalid, ""},
		{"name longer than the data", wire.OptGo, []byte{255, 255, 255, 255, 'd'}, wire.RepErrInvalid, ""},
		{"name too long", wire.OptGo, infoData(long), wire.RepErrInvalid, ""},
		{"name with NUL", wire.OptGo, infoData("a\x00b"), wire.RepErrInvalid, ""},
		{"name not UTF-8", wire.OptGo, infoData("\xff"), wire.RepErrInvalid, ""},
		{"fewer types than counted", wire.OptGo, append(lengthed("d"), 0, 9, 0, 0), wire.RepErrInvalid, ""},
		{"bytes after the types", wire.OptInfo, append(infoData("d"), 1), wire.RepErrInvalid, ""},
		{"metadata without structured replies", wire.OptSetMetaContext, metaData("d"), wire.RepErrInvalid, "structured"},
		{"more queries than bytes", wire.OptListMetaContext, append(lengthed("d"), 255, 255, 255, 255), wire.RepErrInvalid, ""},
		{"query too long", wire.OptListMetaContext, metaData("d", long), wire.RepErrInvalid, ""},
		{"bytes after the queries", wire.OptListMetaContext, append(metaData("d", "q"), 1), wire.RepErrInvalid, ""},
		{"too much data", 98, make([]byte, 64<<10+1), wire.RepErrTooBig, ""},
	} {
		got := c.option(test.opt, test.data)
		if len(got) != 1 || got[0].Type != test.want || !strings.Contains(got[0].Data, test.text) {
			t.Errorf("%s: got %+v, want %#x with %q", test.name, got, uint32(test.want), test.text)
		}
	}
	c.mustGo("d")
	c.mustDo(wire.Request{Command: wire.CmdFlush}, nil)
	broken.look(func() {
		if broken.opens != 1 || broken.closes != 1 {
			t.Errorf("the refused export was opened %d times and closed %d times", broken.opens, broken.closes)
		}
	})
}

func TestHostileHandshakesEndTheConnection(t *testing.T) {
	t.Parallel()
	path := listen(t, one(newDisk(8192)), nbd.Options{})
	for name, test := range map[string]struct {
		flags uint32
		bytes []byte
	}{
		"unknown client flag":         {flags: 1 << 2},
		"wrong magic":                 {flags: 3, bytes: make([]byte, 16)},
		"option of 4 GiB":             {flags: 3, bytes: optionHeader(99, 1<<32-1)},
		"export name of 4 GiB":        {flags: 3, bytes: optionHeader(wire.OptExportName, 1<<32-1)},
		"export name too long":        {flags: 3, bytes: append(optionHeader(wire.OptExportName, 4097), make([]byte, 4097)...)},
		"option without fixed hello":  {flags: 0, bytes: optionHeader(wire.OptList, 0)},
		"goes away within the option": {flags: 3, bytes: optionHeader(wire.OptGo, 100)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := dial(t, path)
			c.hello(test.flags)
			c.write(test.bytes)
			if name == "goes away within the option" {
				if err := c.nc.(*net.UnixConn).CloseWrite(); err != nil {
					t.Fatal(err)
				}
			}
			c.wantEnd()
		})
	}
}

func TestListNamesAllExports(t *testing.T) {
	t.Parallel()
	exports := &disks{byName: map[string]*disk{"": nil, "vm1/d0": nil, "vm1/d0@monday": nil, "bad\xff": nil}}
	var want []optionReply
	for _, n := range []string{"", "vm1/d0", "vm1/d0@monday"} {
		want = append(want, optionReply{wire.RepServer, string(lengthed(n))})
	}
	want = append(want, optionReply{Type: wire.RepAck})
	c := dial(t, listen(t, exports, nbd.Options{}))
	c.hello(1)
	if got := c.option(wire.OptList, nil); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestListOfTenThousandExportsArrivesWhole(t *testing.T) {
	t.Parallel()
	exports := &disks{byName: map[string]*disk{}}
	for i := range 10000 {
		exports.byName[strings.Repeat("x", i%200)+string(rune('a'+i/200))] = nil
	}
	c := dial(t, listen(t, exports, nbd.Options{}))
	c.hello(1)
	if got, want := len(c.option(wire.OptList, nil)), len(exports.byName)+1; got != want {
		t.Errorf("%d replies, want %d", got, want)
	}
}

func TestMetaContextsAreListedAndSelected(t *testing.T) {
	t.Parallel()
	exports := one(newDisk(8192))
	exports.byName["other"] = newDisk(8192)
	path := listen(t, exports, nbd.Options{})
	ack := optionReply{Type: wire.RepAck}
	listed := optionReply{wire.RepMetaContext, "\x00\x00\x00\x00base:allocation"}
	set := optionReply{wire.RepMetaContext, "\x00\x00\x00\x01base:allocation"}
	for _, test := range []struct {
		opt  wire.Option
		data []byte
		want []optionReply
	}{
		{wire.OptListMetaContext, metaData("d"), []optionReply{listed, ack}},
		{wire.OptListMetaContext, metaData("d", "base:"), []optionReply{listed, ack}},
		{wire.OptListMetaContext, metaData("d", "x:", "base:allocation"), []optionReply{listed, ack}},
		{wire.OptListMetaContext, metaData("d", "qemu:"), []optionReply{ack}},
		{wire.OptSetMetaContext, metaData("d", "base:allocation", "base:allocation"), []optionReply{set, ack}},
		{wire.OptSetMetaContext, metaData("d"), []optionReply{ack}},
		{wire.OptSetMetaContext, metaData("d", "base:"), []optionReply{ack}},
	} {
		c := dial(t, path)
		c.hello(3)
		c.structure()
		if got := c.option(test.opt, test.data); !reflect.DeepEqual(got, test.want) {
			t.Errorf("option %d with %q: got %+v, want %+v", test.opt, test.data, got, test.want)
		}
		c.mustGo("d")
		want := wire.EINVAL
		if test.want[0] == set {
			want = wire.OK
		}
		if got := c.do(wire.Request{Command: wire.CmdBlockStatus, LenBytes: 512}, nil).Errno; got != want {
			t.Errorf("block status after %q: error %d, want %d", test.data, got, want)
		}
	}
}

func TestMetaContextCountsOnlyForTheExportItWasSelectedFor(t *testing.T) {
	t.Parallel()
	exports := one(newDisk(8192))
	exports.byName["other"] = newDisk(8192)
	path := listen(t, exports, nbd.Options{})
	for name, second := range map[string][]byte{
		"selected for another export":     nil,
		"replaced by a failing selection": metaData("x", "base:allocation"),
	} {
		c := dial(t, path)
		c.hello(3)
		c.structure()
		first := metaData("other", "base:allocation")
		if second != nil {
			first = metaData("d", "base:allocation")
		}
		c.option(wire.OptSetMetaContext, first)
		if second != nil {
			c.option(wire.OptSetMetaContext, second)
		}
		c.mustGo("d")
		if got := c.do(wire.Request{Command: wire.CmdBlockStatus, LenBytes: 512}, nil).Errno; got != wire.EINVAL {
			t.Errorf("%s: error %d, want EINVAL", name, got)
		}
	}
}

func TestAbortIsAcknowledged(t *testing.T) {
	t.Parallel()
	c := dial(t, listen(t, one(newDisk(512)), nbd.Options{}))
	c.hello(3)
	if got := c.option(wire.OptAbort, nil); got[0].Type != wire.RepAck {
		t.Errorf("got %+v", got)
	}
	c.wantEnd()
}

func TestSilentClientIsClosedAfterTheHandshakeTimeout(t *testing.T) {
	t.Parallel()
	for name, act := range map[string]func(c *client){
		"takes no greeting":         func(*client) {},
		"says nothing":              func(c *client) { c.read(18) },
		"stops within an option":    func(c *client) { c.hello(3); c.write(optionHeader(wire.OptGo, 9)) },
		"takes no answer to a list": func(c *client) { c.hello(3); c.write(optionHeader(wire.OptList, 0)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			clk := clock.NewFake()
			s, err := nbd.New(one(newDisk(512)), clk, slog.New(slog.NewTextHandler(io.Discard, nil)), nbd.Options{HandshakeTimeout: time.Minute})
			if err != nil {
				t.Fatal(err)
			}
			server, nc := net.Pipe()
			ended := make(chan error, 1)
			go func() { ended <- s.ServeConn(t.Context(), server) }()
			act(newClient(t, nc))
			for begun := (clock.System{}).Now(); ; runtime.Gosched() {
				clk.Advance(time.Minute)
				select {
				case <-ended:
					return
				default:
				}
				if (clock.System{}).Now().Sub(begun) > patience {
					t.Fatal("the connection was not closed")
				}
			}
		})
	}
}
