package nbd_test

import (
	"fmt"
	"io"
	"testing"

	"basalt/nbd"
	"basalt/nbd/wire"
)

// BenchmarkLoop measures the connection loop and a unix socket, the disk being
// memory under a mutex. The client keeps depth requests in flight.
func BenchmarkLoop(b *testing.B) {
	for _, cmd := range []wire.Command{wire.CmdRead, wire.CmdWrite} {
		for _, depth := range []int{1, 32} {
			for _, n := range []int{4096, 1 << 20} {
				name := fmt.Sprintf("%s/depth=%d/bytes=%d", map[wire.Command]string{wire.CmdRead: "read", wire.CmdWrite: "write"}[cmd], depth, n)
				b.Run(name, func(b *testing.B) { benchmarkLoop(b, cmd, depth, n) })
			}
		}
	}
}

func benchmarkLoop(b *testing.B, cmd wire.Command, depth, n int) {
	d := newDisk(n)
	d.data[0] = 1 // not a hole
	d.forgetful = true
	c := connectSimple(b, listen(b, one(d), nbd.Options{}))
	q := wire.Request{Command: cmd, LenBytes: uint32(n)}
	request := requestBytes(q)
	answer := wire.SimpleReplySize
	if cmd == wire.CmdWrite {
		request = append(request, make([]byte, n)...)
	} else {
		answer += n
	}
	in := make([]byte, answer)
	b.SetBytes(int64(n))
	b.ReportAllocs()
	inFlight := 0
	for b.Loop() {
		for ; inFlight < depth; inFlight++ {
			if _, err := c.nc.Write(request); err != nil {
				b.Fatal(err)
			}
		}
		if _, err := io.ReadFull(c.nc, in); err != nil {
			b.Fatal(err)
		}
		inFlight--
	}
	for ; inFlight > 0; inFlight-- {
		if _, err := io.ReadFull(c.nc, in); err != nil {
			b.Fatal(err)
		}
	}
}
