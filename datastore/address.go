package datastore

import (
	"errors"
	"fmt"
	"strings"

	"basalt/vmfs"
)

// ErrAddress: an address that does not name what it should.
var ErrAddress = errors.New("datastore: not a valid address")

// Address names a LUN, or an object on it, or a snapshot of a disk on it:
// LUN[:/path[@snap]].
type Address struct {
	LUN      string
	Path     string // "/vm1/d0"; "" when only the LUN is named
	Snapshot string // "" when none is named
}

// ParseAddress splits at the last ":/" that is not the "://" of a URL.
func ParseAddress(s string) (Address, error) {
	if s == "" {
		return Address{}, fmt.Errorf("%w: it is empty", ErrAddress)
	}
	at := -1
	for i := range len(s) - 1 {
		if s[i] == ':' && s[i+1] == '/' && (i+2 >= len(s) || s[i+2] != '/') {
			at = i
		}
	}
	if at < 0 {
		return Address{LUN: s}, nil
	}
	a := Address{LUN: s[:at], Path: s[at+1:]}
	if a.LUN == "" {
		return Address{}, fmt.Errorf("%w: %q names no LUN before the colon", ErrAddress, s)
	}
	if path, snap, ok := strings.Cut(a.Path, "@"); ok {
		a.Path, a.Snapshot = path, snap
		if err := vmfs.CheckName(snap); err != nil {
			return Address{}, fmt.Errorf("snapshot of %q: %w", s, err)
		}
	}
	if _, err := vmfs.SplitPath(a.Path); err != nil {
		return Address{}, err
	}
	return a, nil
}

// String is the inverse of ParseAddress.
func (a Address) String() string {
	s := a.LUN
	if a.Path != "" {
		s += ":" + a.Path
	}
	if a.Snapshot != "" {
		s += "@" + a.Snapshot
	}
	return s
}
