package nbd

import (
	"bytes"
	"encoding/binary"

	"basalt/nbd/wire"
)

// reply fills in r.head and r.tail: success if err is nil, else r.errno.
func (t *transmission) reply(r *request, err error) {
	r.tail = nil
	switch {
	case err != nil && t.structured:
		r.head = wire.AppendErrorChunk(r.head[:0], r.Cookie, r.errno, clientText(err))
	case err != nil:
		r.head = wire.AppendSimpleReply(r.head[:0], r.Cookie, r.errno)
	case r.Command == wire.CmdRead && t.structured:
		t.replyRead(r)
	case r.Command == wire.CmdRead:
		r.head = wire.AppendSimpleReply(r.head[:0], r.Cookie, wire.OK)
		if r.buf != nil {
			r.tail = r.buf.data
		}
	case r.Command == wire.CmdBlockStatus:
		r.tail = r.buf.data
		r.head = wire.AppendBlockStatusHeader(r.head[:0], r.Cookie, allocationID, len(r.tail)/wire.ExtentSize)
	default:
		r.head = wire.AppendSimpleReply(r.head[:0], r.Cookie, wire.OK)
	}
}

// replyRead answers a read by one chunk. Zeros travel as a hole, which spares
// the socket; a client that asked for one piece (DF) gets the data in full.
func (t *transmission) replyRead(r *request) {
	switch {
	case r.buf == nil:
		r.head = wire.AppendNoneChunk(r.head[:0], r.Cookie)
	case r.Flags&wire.CmdFlagDF == 0 && isZero(r.buf.data):
		r.head = wire.AppendHoleChunk(r.head[:0], r.Cookie, r.OffBytes, r.LenBytes)
	default:
		r.tail = r.buf.data
		r.head = wire.AppendDataChunkHeader(r.head[:0], r.Cookie, r.OffBytes, r.LenBytes)
	}
}

// isZero reports whether b holds zeros only. Other data is nearly always told by
// its first bytes; the comparison of b with itself, shifted, is at memory speed.
func isZero(b []byte) bool {
	const word = 8
	if len(b) < word {
		return len(b) == 0 || b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1])
	}
	return binary.NativeEndian.Uint64(b) == 0 && bytes.Equal(b[word:], b[:len(b)-word])
}
