package nbd

import (
	"context"
	"fmt"

	"basalt/nbd/wire"
)

// maxExtents is the most descriptors in one block status reply; the client asks
// again for the rest.
const maxExtents = 4096

// request is one request in flight, and then its reply.
type request struct {
	wire.Request
	refused error // why the Export is not to be asked; nil: it is
	errno   wire.Errno
	buf     *buffer // data to write, data read, or extents; nil for none

	head []byte // the reply, or its head
	tail []byte // the rest of it, within buf
}

// transmission is what a connection negotiated: how its requests are judged,
// executed and answered. It does not change.
type transmission struct {
	export     Export
	info       Info
	structured bool
	allocation bool // block status may be asked for, in the base:allocation context
}

// allocationID names the base:allocation context on the wire.
const allocationID = 1

// flags are the transmission flags that the client is told.
func (t *transmission) flags() wire.TransmissionFlags {
	f := t.info.flags()
	if t.structured {
		f |= wire.FlagSendDF
	}
	return f
}

// bufferBytes is the size of the buffer that the request needs; 0 also when it
// is going to be refused.
func (t *transmission) bufferBytes(q wire.Request) int {
	switch {
	case (q.Command == wire.CmdRead || q.Command == wire.CmdWrite) && q.LenBytes <= wire.MaxPayload:
		return int(q.LenBytes)
	case q.Command == wire.CmdBlockStatus:
		return wire.ExtentSize * maxExtents
	}
	return 0
}

// refuse judges a request by what was negotiated and returns the error number
// and the reason, or OK.
func (t *transmission) refuse(q wire.Request) (wire.Errno, error) {
	writes := false
	known := wire.CmdFlagFUA // valid for every command, even if without effect
	switch q.Command {
	case wire.CmdRead:
		if t.structured {
			known |= wire.CmdFlagDF
		}
	case wire.CmdWrite, wire.CmdTrim:
		writes = true
	case wire.CmdWriteZeroes:
		writes = true
		known |= wire.CmdFlagNoHole
		if t.info.FastZeroes {
			known |= wire.CmdFlagFastZero
		}
	case wire.CmdBlockStatus:
		known |= wire.CmdFlagReqOne
	case wire.CmdFlush, wire.CmdCache:
	default:
		return wire.EINVAL, fmt.Errorf("unknown command %d", q.Command)
	}
	switch {
	case q.Flags&^known != 0:
		return wire.EINVAL, fmt.Errorf("flags %#x are not valid for command %d", uint16(q.Flags&^known), q.Command)
	case writes && t.info.ReadOnly:
		return wire.EPERM, ErrReadOnly
	case q.Command == wire.CmdFlush:
		return wire.OK, nil // offset and length are reserved
	}
	return t.refuseRange(q)
}

// refuseRange judges offset and length.
func (t *transmission) refuseRange(q wire.Request) (wire.Errno, error) {
	size := uint64(t.info.SizeBytes)
	unit := uint64(t.info.MinBlock)
	transfers := q.Command == wire.CmdRead || q.Command == wire.CmdWrite
	switch {
	case transfers && q.LenBytes > t.info.MaxBlock:
		if q.Flags&wire.CmdFlagDF != 0 {
			return wire.EOVERFLOW, fmt.Errorf("length %d is above the maximum of %d", q.LenBytes, t.info.MaxBlock)
		}
		return wire.EINVAL, fmt.Errorf("length %d is above the maximum of %d", q.LenBytes, t.info.MaxBlock)
	case q.OffBytes > size || uint64(q.LenBytes) > size-q.OffBytes:
		err := fmt.Errorf("%d bytes at %d are beyond the end at %d", q.LenBytes, q.OffBytes, size)
		if q.Command == wire.CmdWrite || q.Command == wire.CmdWriteZeroes {
			return wire.ENOSPC, err // as the protocol recommends for writes
		}
		return wire.EINVAL, err
	case q.OffBytes%unit != 0 || uint64(q.LenBytes)%unit != 0:
		return wire.EINVAL, fmt.Errorf("%d bytes at %d are not whole blocks of %d", q.LenBytes, q.OffBytes, unit)
	case q.Command == wire.CmdBlockStatus && !t.allocation:
		return wire.EINVAL, fmt.Errorf("no metadata context was negotiated")
	case q.Command == wire.CmdBlockStatus && q.LenBytes == 0:
		return wire.EINVAL, fmt.Errorf("block status of nothing")
	}
	return wire.OK, nil
}

// execute lets the Export do an unrefused request. Its errors are the Export's.
func (t *transmission) execute(ctx context.Context, r *request) error {
	off, n := int64(r.OffBytes), int64(r.LenBytes)
	fua := r.Flags&wire.CmdFlagFUA != 0
	if n == 0 && r.Command != wire.CmdFlush {
		return nil // nothing to move, but a FUA of nothing is also done
	}
	switch r.Command {
	case wire.CmdRead:
		return t.export.ReadAt(ctx, r.buf.data, off)
	case wire.CmdWrite:
		if fua {
			return t.export.WriteFUA(ctx, r.buf.data, off)
		}
		return t.export.WriteAt(ctx, r.buf.data, off)
	case wire.CmdFlush:
		return t.export.Flush(ctx)
	case wire.CmdTrim:
		if err := t.export.Trim(ctx, off, n); err != nil || !fua {
			return err
		}
		return t.export.Flush(ctx)
	case wire.CmdWriteZeroes:
		return t.export.WriteZeroes(ctx, off, n, ZeroOptions{
			NoHole: r.Flags&wire.CmdFlagNoHole != 0,
			FUA:    fua,
			Fast:   r.Flags&wire.CmdFlagFastZero != 0,
		})
	case wire.CmdCache:
		return nil // advice, and there is no cache to fill
	case wire.CmdBlockStatus:
		return t.blockStatus(ctx, r)
	default:
		panic(fmt.Sprintf("nbd: command %d was not refused", r.Command))
	}
}

// blockStatus gathers the descriptors of the reply in the request's buffer.
func (t *transmission) blockStatus(ctx context.Context, r *request) error {
	limit := maxExtents
	if r.Flags&wire.CmdFlagReqOne != 0 {
		limit = 1
	}
	e := extents{out: r.buf.data[:0], left: int64(r.LenBytes), limit: limit}
	if err := t.export.BlockStatus(ctx, int64(r.OffBytes), int64(r.LenBytes), e.add); err != nil {
		return err
	}
	e.flush()
	if len(e.out) == 0 || e.malformed {
		return fmt.Errorf("nbd: export gave no extent, or one without length")
	}
	r.buf.data = e.out
	return nil
}

// extents merges and clips extents into descriptors.
type extents struct {
	out       []byte
	left      int64 // bytes of the request that no extent has covered yet
	limit     int   // descriptors still allowed
	runBytes  int64 // length of the run that is not in out yet
	runFlags  wire.ExtentFlags
	malformed bool
}

// add takes the next extent and reports whether more are wanted.
func (e *extents) add(x Extent) bool {
	if x.LenBytes <= 0 {
		e.malformed = true
		return false
	}
	var flags wire.ExtentFlags
	if x.Hole {
		flags |= wire.ExtentHole
	}
	if x.Zero {
		flags |= wire.ExtentZero
	}
	if e.runBytes > 0 && flags != e.runFlags {
		e.flush()
	}
	if e.left == 0 || e.limit == 0 {
		return false
	}
	n := min(x.LenBytes, e.left)
	e.runBytes += n
	e.runFlags = flags
	e.left -= n
	return e.left > 0
}

// flush ends the current run.
func (e *extents) flush() {
	if e.runBytes == 0 {
		return
	}
	e.out = wire.AppendExtent(e.out, uint32(e.runBytes), e.runFlags)
	e.runBytes = 0
	e.limit--
}
