package wire

import (
	"encoding/binary"
	"fmt"
)

// Sizes of the parts of the transmission phase, in bytes.
const (
	RequestSize     = 28
	SimpleReplySize = 16
	ChunkHeaderSize = 20
	ExtentSize      = 8 // one block status descriptor
)

const (
	magicRequest         = 0x25609513
	magicSimpleReply     = 0x67446698
	magicStructuredReply = 0x668e33ef

	chunkDone = 1 << 0

	chunkNone        = 0
	chunkOffsetData  = 1
	chunkOffsetHole  = 2
	chunkBlockStatus = 5
	chunkError       = 1<<15 + 1
)

// Command is the type of a request.
type Command uint16

// The commands ("Request types").
const (
	CmdRead        Command = 0
	CmdWrite       Command = 1
	CmdDisconnect  Command = 2
	CmdFlush       Command = 3
	CmdTrim        Command = 4
	CmdCache       Command = 5
	CmdWriteZeroes Command = 6
	CmdBlockStatus Command = 7
)

// CommandFlags modify a command.
type CommandFlags uint16

// The command flags.
const (
	CmdFlagFUA      CommandFlags = 1 << 0
	CmdFlagNoHole   CommandFlags = 1 << 1
	CmdFlagDF       CommandFlags = 1 << 2
	CmdFlagReqOne   CommandFlags = 1 << 3
	CmdFlagFastZero CommandFlags = 1 << 4
)

// Request is one request of the transmission phase; a CmdWrite is followed by
// LenBytes bytes of data.
//
//	off  size  field
//	  0     4  magic     0x25609513
//	  4     2  Flags
//	  6     2  Command
//	  8     8  Cookie    echoed in the reply
//	 16     8  OffBytes  unsigned: may be beyond any export
//	 24     4  LenBytes
type Request struct {
	Flags    CommandFlags
	Command  Command
	Cookie   uint64
	OffBytes uint64
	LenBytes uint32
}

// DecodeRequest reads RequestSize bytes. Only the magic is checked: what a
// command, flag or range means for an export is not the codec's to judge.
func DecodeRequest(b []byte) (Request, error) {
	if len(b) != RequestSize {
		return Request{}, fmt.Errorf("%w: request of %d bytes", ErrMalformed, len(b))
	}
	if m := binary.BigEndian.Uint32(b); m != magicRequest {
		return Request{}, fmt.Errorf("%w: request magic %#x", ErrMalformed, m)
	}
	return Request{
		Flags:    CommandFlags(binary.BigEndian.Uint16(b[4:])),
		Command:  Command(binary.BigEndian.Uint16(b[6:])),
		Cookie:   binary.BigEndian.Uint64(b[8:]),
		OffBytes: binary.BigEndian.Uint64(b[16:]),
		LenBytes: binary.BigEndian.Uint32(b[24:]),
	}, nil
}

// AppendSimpleReply adds a simple reply. The data of a successful CmdRead
// follows it.
func AppendSimpleReply(dst []byte, cookie uint64, e Errno) []byte {
	dst = binary.BigEndian.AppendUint32(dst, magicSimpleReply)
	dst = binary.BigEndian.AppendUint32(dst, uint32(e))
	return binary.BigEndian.AppendUint64(dst, cookie)
}

// AppendNoneChunk adds a structured reply that says success and nothing else.
func AppendNoneChunk(dst []byte, cookie uint64) []byte {
	return appendChunkHeader(dst, chunkNone, cookie, 0)
}

// AppendDataChunkHeader adds the head of the only chunk of a reply, which
// lenBytes bytes of data from offBytes follow.
func AppendDataChunkHeader(dst []byte, cookie, offBytes uint64, lenBytes uint32) []byte {
	dst = appendChunkHeader(dst, chunkOffsetData, cookie, 8+lenBytes)
	return binary.BigEndian.AppendUint64(dst, offBytes)
}

// AppendHoleChunk adds the only chunk of a reply: lenBytes zeros from offBytes.
func AppendHoleChunk(dst []byte, cookie, offBytes uint64, lenBytes uint32) []byte {
	dst = appendChunkHeader(dst, chunkOffsetHole, cookie, 12)
	dst = binary.BigEndian.AppendUint64(dst, offBytes)
	return binary.BigEndian.AppendUint32(dst, lenBytes)
}

// AppendErrorChunk adds the only chunk of a reply: an error with a text for
// people, which is cut to MaxName bytes.
func AppendErrorChunk(dst []byte, cookie uint64, e Errno, message string) []byte {
	message = message[:min(len(message), MaxName)]
	dst = appendChunkHeader(dst, chunkError, cookie, uint32(6+len(message)))
	dst = binary.BigEndian.AppendUint32(dst, uint32(e))
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(message)))
	return append(dst, message...)
}

// AppendBlockStatusHeader adds the head of the only chunk of a reply, which
// extents descriptors, each by AppendExtent, follow.
func AppendBlockStatusHeader(dst []byte, cookie uint64, contextID uint32, extents int) []byte {
	dst = appendChunkHeader(dst, chunkBlockStatus, cookie, uint32(4+ExtentSize*extents))
	return binary.BigEndian.AppendUint32(dst, contextID)
}

// ExtentFlags describe an extent of the base:allocation context.
type ExtentFlags uint32

// The states of an extent.
const (
	ExtentHole ExtentFlags = 1 << 0
	ExtentZero ExtentFlags = 1 << 1
)

// AppendExtent adds one block status descriptor.
func AppendExtent(dst []byte, lenBytes uint32, flags ExtentFlags) []byte {
	dst = binary.BigEndian.AppendUint32(dst, lenBytes)
	return binary.BigEndian.AppendUint32(dst, uint32(flags))
}

// appendChunkHeader starts a structured reply of one chunk, hence "done".
func appendChunkHeader(dst []byte, typ uint16, cookie uint64, lenBytes uint32) []byte {
	dst = binary.BigEndian.AppendUint32(dst, magicStructuredReply)
	dst = binary.BigEndian.AppendUint16(dst, chunkDone)
	dst = binary.BigEndian.AppendUint16(dst, typ)
	dst = binary.BigEndian.AppendUint64(dst, cookie)
	return binary.BigEndian.AppendUint32(dst, lenBytes)
}
