// Package wire is the codec of the NBD protocol: bytes to values and back, with
// no I/O and no state. Section names in comments are those of the protocol's
// document, doc/proto.md of the NetworkBlockDevice project.
//
// Integers are big-endian. Every Decode function checks each length it meets
// against the bytes it was given and against a constant before it allocates, and
// accepts no trailing bytes. Append functions add one whole message, or the part
// of it that their name says, to dst and return the longer slice.
package wire

import (
	"errors"
	"unicode/utf8"
)

// Limits on what a peer may send.
const (
	MaxName    = 4096     // bytes of an export name, a query or a message ("Conventions")
	MaxOption  = 64 << 10 // bytes of option data
	MaxQueries = 256      // metadata queries in one option
	MaxPayload = 32 << 20 // bytes of one read or write ("Size constraints": the portable maximum)
)

// ErrMalformed is wrapped by every error of a Decode function: the bytes are not
// what the protocol allows there.
var ErrMalformed = errors.New("nbd: malformed message")

// Errno is an error number of the transmission phase ("Error values"). The
// values are the protocol's, not the platform's.
type Errno uint32

// The error numbers of the protocol.
const (
	OK        Errno = 0
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// IsString reports whether s may stand where the protocol wants a string: UTF-8
// without NUL, at most MaxName bytes.
func IsString(s string) bool {
	if len(s) > MaxName || !utf8.ValidString(s) {
		return false
	}
	for i := range len(s) {
		if s[i] == 0 {
			return false
		}
	}
	return true
}
