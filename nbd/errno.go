package nbd

import (
	"errors"
	"strings"

	"basalt/block"
	"basalt/nbd/wire"
)

// isLost reports whether an Export's error forbids any reply.
func isLost(err error) bool {
	return errors.Is(err, ErrLost) || errors.Is(err, block.ErrFenced)
}

// errnoOf chooses the error number for an Export's error.
func errnoOf(err error) wire.Errno {
	for _, e := range []struct {
		is    error
		errno wire.Errno
	}{
		{ErrNoSpace, wire.ENOSPC},
		{block.ErrNoSpace, wire.ENOSPC},
		{ErrReadOnly, wire.EPERM},
		{ErrNotSupported, wire.ENOTSUP},
		{block.ErrNotSupported, wire.ENOTSUP},
		{ErrInvalid, wire.EINVAL},
		{block.ErrOutOfRange, wire.EINVAL},
		{block.ErrMisaligned, wire.EINVAL},
	} {
		if errors.Is(err, e.is) {
			return e.errno
		}
	}
	return wire.EIO
}

// optionReplyOf chooses the reply to an option for an Exports' error. The
// protocol has no reply for "cannot just now": policy is the one that clients
// show with its text and do not take for a missing export.
func optionReplyOf(err error) wire.OptionReply {
	switch {
	case errors.Is(err, ErrNotFound):
		return wire.RepErrUnknown
	case errors.Is(err, ErrShutdown):
		return wire.RepErrShutdown
	default:
		return wire.RepErrPolicy
	}
}

// maxText is the most bytes of an error's text that a client gets to see.
const maxText = 256

// clientText is an error as a string of the protocol: UTF-8 without NUL.
func clientText(err error) string {
	s := err.Error()
	s = s[:min(len(s), maxText)]
	return strings.ReplaceAll(strings.ToValidUTF8(s, "?"), "\x00", "?")
}
