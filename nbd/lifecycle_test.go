package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"testing"

	"basalt/nbd"
	"basalt/nbd/wire"
)

// gate holds the operations of one kind until it is opened.
type gate struct {
	op      string
	arrived chan struct{} // one value for each operation that came
	open    chan struct{}
	heedCtx bool
}

func newGate(op string) *gate {
	return &gate{op: op, arrived: make(chan struct{}, 1000), open: make(chan struct{})}
}

func (g *gate) before(ctx context.Context, op string, _ int64) error {
	if op != g.op {
		return nil
	}
	g.arrived <- struct{}{}
	if !g.heedCtx {
		<-g.open
		return nil
	}
	select {
	case <-g.open:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func TestDisconnectLetsRequestsRunToTheirEndBeforeClose(t *testing.T) {
	t.Parallel()
	g := newGate("write")
	d := newDisk(8192)
	d.before = g.before
	s := newServer(t, one(d), nbd.Options{})
	path, served := serve(t, t.Context(), s)
	c := connect(t, path)
	c.send(wire.Request{Command: wire.CmdWrite, LenBytes: 512}, bytes.Repeat([]byte{5}, 512))
	within(t, "the write", g.arrived)
	c.nc.Close()
	d.look(func() {
		if d.closes != 0 {
			t.Error("the export was closed under a request")
		}
	})
	close(g.open)
	if err := s.Shutdown(t.Context()); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	if err := within(t, "Serve's return", served); err != nil {
		t.Errorf("Serve: %v", err)
	}
	if d.data[511] != 5 || d.closes != 1 || d.closedIn != 0 {
		t.Errorf("byte %d, %d closes, %d of them under a request", d.data[511], d.closes, d.closedIn)
	}
}

func TestFailureToCloseTheExportIsReported(t *testing.T) {
	t.Parallel()
	d := newDisk(8192)
	d.closeErr = errors.New("lock was not released")
	s := newServer(t, one(d), nbd.Options{})
	server, nc := net.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- s.ServeConn(t.Context(), server) }()
	c := newClient(t, nc)
	c.hello(3)
	c.mustGo("d")
	c.send(wire.Request{Command: wire.CmdDisconnect}, nil)
	if err := within(t, "the end", ended); !errors.Is(err, d.closeErr) {
		t.Errorf("ServeConn: %v", err)
	}
}

func TestHalfClosedClientGetsAllItsReplies(t *testing.T) {
	t.Parallel()
	g := newGate("flush")
	d := newDisk(8192)
	d.before = g.before
	c := connect(t, listen(t, one(d), nbd.Options{}))
	for i := range 100 {
		c.send(wire.Request{Command: wire.CmdFlush, Cookie: uint64(i)}, nil)
	}
	// An incomplete request at the end is dropped.
	c.write(requestBytes(wire.Request{Command: wire.CmdWrite, LenBytes: 512}), make([]byte, 511))
	if err := c.nc.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	close(g.open)
	seen := map[uint64]bool{}
	for range 100 {
		r := c.reply()
		if r.Errno != wire.OK || seen[r.Cookie] {
			t.Fatalf("reply %+v", r)
		}
		seen[r.Cookie] = true
	}
	c.wantEnd()
	for _, op := range d.did() {
		if op == "write" {
			t.Error("an incomplete write reached the export")
		}
	}
}

// A client whose connection broke sends its requests again on a new one, and then
// newer ones. The old connection's requests, in the export, in the queue or unread
// in the socket, must all be done, or dropped for good, before the new
// connection's first.
func TestReconnectedClientIsNotOvertakenByItsOldRequests(t *testing.T) {
	t.Parallel()
	g := newGate("write")
	d := newDisk(4096)
	d.before = g.before
	path := listen(t, one(d), nbd.Options{Workers: 1})

	first := connectSimple(t, path)
	var all []byte
	for i := range 500 {
		all = append(all, requestBytes(wire.Request{Command: wire.CmdWrite, LenBytes: 4096})...)
		all = append(all, bytes.Repeat([]byte{byte(i)}, 4096)...)
	}
	wrote := make(chan struct{})
	go func() {
		defer close(wrote)
		_, _ = first.nc.Write(all) // as much as the socket takes before it is closed
	}()
	within(t, "the first write", g.arrived)
	first.nc.Close()
	<-wrote

	second := dial(t, path)
	second.hello(3)
	second.write(optionHeader(wire.OptGo, uint32(len(infoData("d")))), infoData("d"))
	second.wantSilence()
	close(g.open)
	second.optionReplies(wire.OptGo)
	before := len(d.did())
	payload := bytes.Repeat([]byte{0xee}, 4096)
	second.mustDo(wire.Request{Command: wire.CmdWrite, LenBytes: 4096}, payload)
	got := second.mustDo(wire.Request{Command: wire.CmdRead, LenBytes: 4096}, nil).Data
	if !bytes.Equal(got, payload) {
		t.Errorf("the new write was overwritten by old write %d", got[0])
	}
	if after := len(d.did()); after != before+2 {
		t.Errorf("%d operations before the second connection's requests, %d after its two", before, after)
	}
}

// A predecessor whose requests never end must not hold up the client for ever.
func TestReconnectIsRefusedWhileOldRequestsHang(t *testing.T) {
	t.Parallel()
	g := newGate("write")
	d := newDisk(4096)
	d.before = g.before
	path := listen(t, one(d), nbd.Options{HandshakeTimeout: 10 * grace})
	first := connect(t, path)
	first.send(wire.Request{Command: wire.CmdWrite, LenBytes: 4096}, make([]byte, 4096))
	within(t, "the first write", g.arrived)
	first.nc.Close()
	second := dial(t, path)
	second.hello(3)
	if r := second.option(wire.OptGo, infoData("d")); r[0].Type != wire.RepErrPolicy {
		t.Errorf("go: %+v", r)
	}
	close(g.open)
	second.mustGo("d")
	d.look(func() {
		if d.closes != 2 { // the first connection's and the refused one's
			t.Errorf("%d closes", d.closes)
		}
	})
}

// Another connection of the same client is not a predecessor.
func TestSecondConnectionDoesNotWaitForALivingFirst(t *testing.T) {
	t.Parallel()
	g := newGate("write")
	d := newDisk(4096)
	d.before = g.before
	path := listen(t, one(d), nbd.Options{})
	first := connect(t, path)
	first.send(wire.Request{Command: wire.CmdWrite, LenBytes: 512}, make([]byte, 512))
	within(t, "the write", g.arrived)
	second := connect(t, path)
	second.mustDo(wire.Request{Command: wire.CmdFlush}, nil)
	close(g.open)
	if r := first.reply(); r.Errno != wire.OK {
		t.Errorf("first write: %+v", r)
	}
}

func TestShutdownAnswersWhatIsInFlightThenCloses(t *testing.T) {
	t.Parallel()
	g := newGate("write")
	d := newDisk(8192)
	d.before = g.before
	s := newServer(t, one(d), nbd.Options{})
	path, served := serve(t, t.Context(), s)
	haggling := dial(t, path)
	haggling.hello(3)
	haggling.structure()
	c := connect(t, path)
	c.send(wire.Request{Command: wire.CmdWrite, LenBytes: 512, Cookie: 3}, make([]byte, 512))
	within(t, "the write", g.arrived)
	stopped := make(chan error, 1)
	go func() { stopped <- s.Shutdown(t.Context()) }()
	haggling.wantEnd() // Shutdown has begun
	close(g.open)
	if r := c.reply(); r.Cookie != 3 || r.Errno != wire.OK {
		t.Errorf("reply %+v", r)
	}
	c.wantEnd()
	if err := within(t, "the shutdown", stopped); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	if err := within(t, "Serve's return", served); err != nil {
		t.Errorf("Serve: %v", err)
	}
	server, _ := net.Pipe()
	if err := s.ServeConn(t.Context(), server); !errors.Is(err, nbd.ErrClosed) {
		t.Errorf("ServeConn after Shutdown: %v, want ErrClosed", err)
	}
	if d.closes != 1 || d.closedIn != 0 {
		t.Errorf("%d closes, %d of them under a request", d.closes, d.closedIn)
	}
}

func TestShutdownBreaksOffAnOpen(t *testing.T) {
	t.Parallel()
	exports := one(newDisk(8192))
	opening := make(chan struct{}, 1)
	exports.opening = func(ctx context.Context) error {
		opening <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}
	s := newServer(t, exports, nbd.Options{})
	path, served := serve(t, t.Context(), s)
	c := dial(t, path)
	c.hello(3)
	c.write(optionHeader(wire.OptGo, uint32(len(infoData("d")))), infoData("d"))
	within(t, "the open", opening)
	if err := s.Shutdown(t.Context()); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	c.wantEnd()
	if err := within(t, "Serve's return", served); err != nil {
		t.Errorf("Serve: %v", err)
	}
}

// A request that Shutdown gives up on is not answered by an error: the client
// sends it again to the successor.
func TestShutdownOutOfPatienceAnswersNothing(t *testing.T) {
	t.Parallel()
	g := newGate("write")
	g.heedCtx = true
	d := newDisk(8192)
	d.before = g.before
	s := newServer(t, one(d), nbd.Options{})
	path, served := serve(t, t.Context(), s)
	c := connect(t, path)
	c.send(wire.Request{Command: wire.CmdWrite, LenBytes: 512}, make([]byte, 512))
	within(t, "the write", g.arrived)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Shutdown: %v, want the context's error", err)
	}
	c.wantEnd()
	if err := within(t, "Serve's return", served); err != nil {
		t.Errorf("Serve: %v", err)
	}
	if d.closes != 1 || d.closedIn != 0 {
		t.Errorf("%d closes, %d of them under a request", d.closes, d.closedIn)
	}
}

func TestServeDrainsWhenItsContextEnds(t *testing.T) {
	t.Parallel()
	g := newGate("flush")
	d := newDisk(8192)
	d.before = g.before
	s := newServer(t, one(d), nbd.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	path, served := serve(t, ctx, s)
	otherPath, otherServed := serve(t, t.Context(), s)
	c, other := connect(t, path), connect(t, otherPath)
	c.send(wire.Request{Command: wire.CmdFlush}, nil)
	within(t, "the flush", g.arrived)
	cancel()
	close(g.open)
	if r := c.reply(); r.Errno != wire.OK {
		t.Errorf("reply %+v", r)
	}
	c.wantEnd()
	if err := within(t, "Serve's return", served); err != nil {
		t.Errorf("Serve: %v", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	other.mustDo(wire.Request{Command: wire.CmdFlush}, nil) // the other listener's goes on
	if err := s.Shutdown(t.Context()); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	if err := within(t, "the other Serve's return", otherServed); err != nil {
		t.Errorf("Serve: %v", err)
	}
}

func TestConnectionsAboveTheLimitAreClosed(t *testing.T) {
	t.Parallel()
	path := listen(t, one(newDisk(8192)), nbd.Options{MaxConnections: 2})
	first := connect(t, path)
	connect(t, path)
	dial(t, path).wantEnd()
	first.mustDo(wire.Request{Command: wire.CmdFlush}, nil)
	first.send(wire.Request{Command: wire.CmdDisconnect}, nil)
	first.wantEnd()
	// The place is free again as soon as the server has noticed.
	for {
		c := dial(t, path)
		if n, _ := c.nc.Read(make([]byte, 1)); n == 1 {
			break
		}
	}
}

func TestOptionsOutOfRangeAreRefused(t *testing.T) {
	t.Parallel()
	for _, o := range []nbd.Options{{Workers: 129}, {Workers: -1}, {MaxConnections: -1}, {HandshakeTimeout: -1}} {
		if _, err := nbd.New(one(newDisk(512)), nil, nil, o); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
}
