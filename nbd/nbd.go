// Package nbd serves exports to NBD clients: fixed newstyle handshake,
// structured replies, FUA, trim, write-zeroes, multi-conn and the
// base:allocation metadata context. The byte formats are in nbd/wire; this
// package is the negotiation and the connection loop.
//
// It does not cache, does not order overlapping requests, does not know what an
// export is made of, and does not offer TLS: over TCP, only trusted networks.
//
// One goroutine per connection reads requests; at most Options.Workers others,
// started as the load needs them, call the Export and write the replies. A
// connection has at most maxInFlight requests and maxInFlightBytes of buffers in
// flight, from the reading of a request to the writing of its reply; beyond that
// its socket is not read, so a client slows down that does not take its replies.
//
// Invariants:
//   - A reply says success only after the Export's method returned nil.
//   - A request that was handed to the Export runs to its end before Export.Close,
//     whatever became of the client.
//   - After ErrLost, or once Shutdown's patience has ended, nothing is replied any
//     more on the connection: the client must find out elsewhere what happened.
//   - A connection enters transmission only after every connection to the same
//     export name whose client has already gone has ended. A client that lost a
//     connection and sends its requests again on a new one is therefore not
//     overtaken by its own old requests. Over TCP this holds only if the end of
//     the old connection has reached this host; see Server.awaitGone.
//
// Lock order: Server.mu > conn.mu. conn.mu, writer.mu and budget.mu are never
// held across an Export's method or a transfer.
package nbd

import (
	"context"
	"errors"
	"fmt"
	"math/bits"

	"basalt/nbd/wire"
)

// Errors that an Exports or an Export wraps to choose the reply. Those of package
// block that mean the same are understood too. All others are EIO.
var (
	// ErrNotFound: there is no export of that name (NBD_REP_ERR_UNKNOWN).
	ErrNotFound = errors.New("nbd: no such export")
	// ErrShutdown: no export is given out any more (NBD_REP_ERR_SHUTDOWN).
	ErrShutdown = errors.New("nbd: shutting down")
	// ErrNoSpace: the storage beneath the export is full (ENOSPC).
	ErrNoSpace = errors.New("nbd: no space left beneath the export")
	// ErrReadOnly: the export takes no writes (EPERM).
	ErrReadOnly = errors.New("nbd: export is read-only")
	// ErrInvalid: the request makes no sense for the export (EINVAL).
	ErrInvalid = errors.New("nbd: invalid request")
	// ErrNotSupported: a fast WriteZeroes would be slow (ENOTSUP).
	ErrNotSupported = errors.New("nbd: not supported")
	// ErrLost: this host may no longer say what became of the request, for
	// another may own the export by now. The client gets no reply: its connection
	// is closed.
	ErrLost = errors.New("nbd: export is lost")
)

// Exports are the disks that a Server offers, by name. Names are UTF-8 without
// NUL of at most 4096 bytes; the empty name is the default export. The text of an
// error may be shown to the client. All methods may be called at once. Their
// contexts end when the handshake is broken off or over; an Export that Open
// returned is not bound by it.
type Exports interface {
	// List returns the names that a client may know of.
	List(ctx context.Context) ([]string, error)

	// Describe tells of an export without opening it.
	Describe(ctx context.Context, name string) (Info, error)

	// Open gives a connection access to the export, until Export.Close.
	Open(ctx context.Context, name string) (Export, error)
}

// Info describes an export. Block sizes are in bytes and powers of two, except
// that MaxBlock only needs to be a multiple of MinBlock.
type Info struct {
	SizeBytes      int64  // a multiple of MinBlock
	MinBlock       uint32 // unit of offsets and lengths, at most 64 KiB; default 1
	PreferredBlock uint32 // best size of small requests; default 4096, at least MinBlock
	MaxBlock       uint32 // longest read or write; default and limit 32 MiB
	ReadOnly       bool   // the server then refuses all that writes
	FastZeroes     bool   // WriteZeroes without NoHole is faster than writing zeros
	Description    string // for people; may be empty
}

// Export is one connection's access to a disk. Offsets and lengths are in bytes,
// within the size and multiples of the minimum block that Info gave at Open. The
// methods may be called at once from several goroutines.
//
// All connections to an export share one state: when a Flush has returned, every
// write that completed before it was called, through any connection, is durable.
// That is what the server advertises as CAN_MULTI_CONN.
//
// The context ends only when the server gives up waiting in Shutdown. The buffer
// p belongs to the Export until the method returns, not longer.
type Export interface {
	// Info is constant until Close, SizeBytes included.
	Info() Info

	// ReadAt fills p from offBytes.
	ReadAt(ctx context.Context, p []byte, offBytes int64) error

	// WriteAt writes p at offBytes; it need not be durable.
	WriteAt(ctx context.Context, p []byte, offBytes int64) error

	// WriteFUA writes p at offBytes; it is durable when this returns nil.
	WriteFUA(ctx context.Context, p []byte, offBytes int64) error

	// Flush makes durable what completed before the call.
	Flush(ctx context.Context) error

	// Trim tells that the range's content is no longer needed. A trim with FUA
	// is a Trim and then a Flush.
	Trim(ctx context.Context, offBytes, lenBytes int64) error

	// WriteZeroes makes the range read as zeros.
	WriteZeroes(ctx context.Context, offBytes, lenBytes int64, o ZeroOptions) error

	// BlockStatus calls emit for consecutive extents from offBytes on, at least
	// once, until the range is covered or emit returns false. The last extent may
	// reach beyond the range.
	BlockStatus(ctx context.Context, offBytes, lenBytes int64, emit func(Extent) bool) error

	// Close ends this connection's access. No method is in progress then.
	Close() error
}

// ZeroOptions qualify a WriteZeroes.
type ZeroOptions struct {
	NoHole bool // the range stays or becomes allocated
	FUA    bool // durable when the call returns nil
	Fast   bool // ErrNotSupported at once, with nothing changed, if not faster than writing zeros
}

// Extent is a run of bytes of equal state. Hole: not allocated, so that a write
// may meet ErrNoSpace. Zero: reads as zeros.
type Extent struct {
	LenBytes   int64 // positive
	Hole, Zero bool
}

const (
	maxMinBlock           = 64 << 10
	defaultPreferredBlock = 4096
)

// withDefaults fills in what the Info leaves open and refuses one that cannot be
// told to a client: an Export's mistake.
func (i Info) withDefaults() (Info, error) {
	if i.MinBlock == 0 {
		i.MinBlock = 1
	}
	if i.PreferredBlock == 0 {
		i.PreferredBlock = max(defaultPreferredBlock, i.MinBlock)
	}
	if i.MaxBlock == 0 {
		i.MaxBlock = wire.MaxPayload
	}
	switch {
	case i.SizeBytes < 0 || i.SizeBytes%int64(i.MinBlock) != 0:
		return Info{}, fmt.Errorf("nbd: export of %d bytes has blocks of %d", i.SizeBytes, i.MinBlock)
	case bits.OnesCount32(i.MinBlock) != 1 || i.MinBlock > maxMinBlock,
		bits.OnesCount32(i.PreferredBlock) != 1 || i.PreferredBlock < max(i.MinBlock, 512),
		i.MaxBlock < i.PreferredBlock || i.MaxBlock%i.MinBlock != 0 || i.MaxBlock > wire.MaxPayload:
		return Info{}, fmt.Errorf("nbd: export has block sizes %d, %d, %d", i.MinBlock, i.PreferredBlock, i.MaxBlock)
	case !wire.IsString(i.Description):
		return Info{}, errors.New("nbd: export has a description that is not text")
	}
	return i, nil
}

// flags are the transmission flags of an export.
func (i Info) flags() wire.TransmissionFlags {
	f := wire.FlagHasFlags | wire.FlagSendFlush | wire.FlagSendFUA | wire.FlagCanMultiConn | wire.FlagSendCache
	if i.ReadOnly {
		return f | wire.FlagReadOnly
	}
	f |= wire.FlagSendTrim | wire.FlagSendWriteZeroes
	if i.FastZeroes {
		f |= wire.FlagSendFastZero
	}
	return f
}
