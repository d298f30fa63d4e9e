package nbd_test

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"

	"basalt/internal/clock"
	"basalt/nbd/wire"
)

// client speaks the protocol as bytes, so that it can also speak it wrongly.
type client struct {
	t          testing.TB
	nc         net.Conn
	structured bool
	readBytes  map[uint64]uint32 // of the simple replies to come, by cookie
}

func newClient(t testing.TB, nc net.Conn) *client {
	t.Helper()
	if err := nc.SetDeadline(clock.System{}.Wall().Add(patience)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	return &client{t: t, nc: nc, readBytes: map[uint64]uint32{}}
}

func dial(t testing.TB, path string) *client {
	t.Helper()
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return newClient(t, nc)
}

// connect dials and enters transmission with export "d", with structured replies
// and base:allocation.
func connect(t testing.TB, path string) *client {
	t.Helper()
	c := dial(t, path)
	c.hello(3)
	c.structure()
	c.option(wire.OptSetMetaContext, metaData("d", "base:allocation"))
	c.mustGo("d")
	return c
}

// connectSimple is connect with simple replies.
func connectSimple(t testing.TB, path string) *client {
	t.Helper()
	c := dial(t, path)
	c.hello(3)
	c.mustGo("d")
	return c
}

func (c *client) write(b ...[]byte) {
	c.t.Helper()
	for _, p := range b {
		if len(p) == 0 {
			continue // an empty write still fails on a socket that the server has closed
		}
		if _, err := c.nc.Write(p); err != nil {
			c.t.Fatalf("client write: %v", err)
		}
	}
}

func (c *client) read(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c.nc, b); err != nil {
		c.t.Fatalf("client read of %d bytes: %v", n, err)
	}
	return b
}

// wantSilence checks that the server says nothing for a while.
func (c *client) wantSilence() {
	c.t.Helper()
	wall := clock.System{}.Wall()
	if err := c.nc.SetReadDeadline(wall.Add(grace)); err != nil {
		c.t.Fatal(err)
	}
	if n, err := c.nc.Read(make([]byte, 1)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Fatalf("got %d bytes and %v, want silence", n, err)
	}
	if err := c.nc.SetReadDeadline(wall.Add(patience)); err != nil {
		c.t.Fatal(err)
	}
}

// wantEnd checks that the server closes the connection without another byte.
func (c *client) wantEnd() {
	c.t.Helper()
	n, err := c.nc.Read(make([]byte, 1))
	if n != 0 || !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		c.t.Fatalf("got %d bytes and %v, want the end of the connection", n, err)
	}
}

func (c *client) hello(flags uint32) {
	c.t.Helper()
	g := c.read(18)
	if string(g[:16]) != "NBDMAGICIHAVEOPT" || binary.BigEndian.Uint16(g[16:]) != 3 {
		c.t.Fatalf("greeting %q", g)
	}
	c.write(binary.BigEndian.AppendUint32(nil, flags))
}

func optionHeader(opt wire.Option, lenBytes uint32) []byte {
	b := append([]byte{}, "IHAVEOPT"...)
	b = binary.BigEndian.AppendUint32(b, uint32(opt))
	return binary.BigEndian.AppendUint32(b, lenBytes)
}

type optionReply struct {
	Type wire.OptionReply
	Data string
}

// option sends an option and returns its replies up to the final one.
func (c *client) option(opt wire.Option, data []byte) []optionReply {
	c.t.Helper()
	c.write(optionHeader(opt, uint32(len(data))), data)
	return c.optionReplies(opt)
}

func (c *client) optionReplies(opt wire.Option) []optionReply {
	c.t.Helper()
	var out []optionReply
	for {
		h := c.read(20)
		if binary.BigEndian.Uint64(h) != 0x3e889045565a9 || wire.Option(binary.BigEndian.Uint32(h[8:])) != opt {
			c.t.Fatalf("reply header %x to option %d", h, opt)
		}
		r := optionReply{Type: wire.OptionReply(binary.BigEndian.Uint32(h[12:]))}
		r.Data = string(c.read(int(binary.BigEndian.Uint32(h[16:]))))
		out = append(out, r)
		if r.Type == wire.RepAck || r.Type>>31 == 1 {
			return out
		}
	}
}

func (c *client) structure() {
	c.t.Helper()
	if r := c.option(wire.OptStructuredReply, nil); r[0].Type != wire.RepAck {
		c.t.Fatalf("structured reply: %+v", r)
	}
	c.structured = true
}

// mustGo enters transmission.
func (c *client) mustGo(name string) []optionReply {
	c.t.Helper()
	r := c.option(wire.OptGo, infoData(name))
	if r[len(r)-1].Type != wire.RepAck {
		c.t.Fatalf("go: %+v", r)
	}
	return r
}

func lengthed(s string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...)
}

func infoData(name string, types ...wire.InfoType) []byte {
	b := binary.BigEndian.AppendUint16(lengthed(name), uint16(len(types)))
	for _, t := range types {
		b = binary.BigEndian.AppendUint16(b, uint16(t))
	}
	return b
}

func metaData(name string, queries ...string) []byte {
	b := binary.BigEndian.AppendUint32(lengthed(name), uint32(len(queries)))
	for _, q := range queries {
		b = append(b, lengthed(q)...)
	}
	return b
}

func requestBytes(q wire.Request) []byte {
	b := binary.BigEndian.AppendUint32(nil, 0x25609513)
	b = binary.BigEndian.AppendUint16(b, uint16(q.Flags))
	b = binary.BigEndian.AppendUint16(b, uint16(q.Command))
	b = binary.BigEndian.AppendUint64(b, q.Cookie)
	b = binary.BigEndian.AppendUint64(b, q.OffBytes)
	return binary.BigEndian.AppendUint32(b, q.LenBytes)
}

// send sends a request without waiting for its reply.
func (c *client) send(q wire.Request, payload []byte) {
	c.t.Helper()
	if q.Command == wire.CmdRead && !c.structured {
		c.readBytes[q.Cookie] = q.LenBytes
	}
	c.write(requestBytes(q), payload)
}

type reply struct {
	Cookie uint64
	Errno  wire.Errno
	Chunk  int    // type of the structured chunk; -1 for a simple reply
	Data   []byte // payload; of an error chunk, the message
}

func (c *client) reply() reply {
	c.t.Helper()
	switch m := binary.BigEndian.Uint32(c.read(4)); m {
	case 0x67446698:
		h := c.read(12)
		r := reply{Errno: wire.Errno(binary.BigEndian.Uint32(h)), Cookie: binary.BigEndian.Uint64(h[4:]), Chunk: -1}
		n := c.readBytes[r.Cookie]
		delete(c.readBytes, r.Cookie)
		if r.Errno == 0 && n > 0 {
			if c.structured {
				c.t.Fatal("simple reply to a read under structured replies")
			}
			r.Data = c.read(int(n))
		}
		return r
	case 0x668e33ef:
		h := c.read(16)
		if flags := binary.BigEndian.Uint16(h); flags != 1 || !c.structured {
			c.t.Fatalf("chunk header %x", h)
		}
		r := reply{Chunk: int(binary.BigEndian.Uint16(h[2:])), Cookie: binary.BigEndian.Uint64(h[4:])}
		r.Data = c.read(int(binary.BigEndian.Uint32(h[12:])))
		if r.Chunk == 1<<15+1 {
			r.Errno = wire.Errno(binary.BigEndian.Uint32(r.Data))
			if n := binary.BigEndian.Uint16(r.Data[4:]); int(n) != len(r.Data)-6 {
				c.t.Fatalf("error chunk %x", r.Data)
			}
			r.Data = r.Data[6:]
		}
		return r
	default:
		c.t.Fatalf("reply magic %#x", m)
		panic("unreachable")
	}
}

// do sends a request and returns its reply, which must be the next.
func (c *client) do(q wire.Request, payload []byte) reply {
	c.t.Helper()
	c.send(q, payload)
	r := c.reply()
	if r.Cookie != q.Cookie {
		c.t.Fatalf("reply to %d, want %d", r.Cookie, q.Cookie)
	}
	return r
}

// mustDo is do for a request that must succeed.
func (c *client) mustDo(q wire.Request, payload []byte) reply {
	c.t.Helper()
	r := c.do(q, payload)
	if r.Errno != wire.OK {
		c.t.Fatalf("%+v: error %d %q", q, r.Errno, r.Data)
	}
	return r
}
