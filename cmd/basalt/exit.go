package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"basalt/block"
	"basalt/datastore"
	"basalt/lease"
	"basalt/store"
	"basalt/thinprov"
	"basalt/vmfs"
)

// The exit codes of the command contract.
const (
	exitDone     = 0
	exitFailed   = 1
	exitUsage    = 2
	exitNotFound = 3
	exitHeld     = 4
	exitNoSpace  = 5
	exitDamaged  = 6
)

// usageError is a command line that makes no sense.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error {
	return usageError{fmt.Errorf(format, args...)}
}

// errDamaged: check found damage.
var errDamaged = errors.New("the volume is damaged")

// exitCode gives the code of an error. Damage counts most: it is what one must not
// overlook.
func exitCode(err error) int {
	if err == nil {
		return exitDone
	}
	if remote, ok := errors.AsType[*store.RemoteError](err); ok {
		return remote.Code
	}
	if _, ok := errors.AsType[*block.CorruptError](err); ok {
		return exitDamaged
	}
	if _, ok := errors.AsType[usageError](err); ok {
		return exitUsage
	}
	for _, c := range []struct {
		code int
		errs []error
	}{
		{exitDamaged, []error{errDamaged, vmfs.ErrTruncated, vmfs.ErrLyingDevice}},
		{exitUsage, []error{vmfs.ErrName, datastore.ErrAddress, store.ErrAddress, store.ErrListen, thinprov.ErrName}},
		{exitHeld, []error{vmfs.ErrHeld, lease.ErrAlive, lease.ErrUnfenced, lease.ErrNameInUse, lease.ErrNotShared, lease.ErrNoSlot, lease.ErrLost, datastore.ErrDiskOpen, block.ErrBusy}},
		{exitNoSpace, []error{vmfs.ErrNoSpace, thinprov.ErrNoSpace, block.ErrNoSpace, vmfs.ErrNoObjects, vmfs.ErrFolderFull}},
		{exitNotFound, []error{vmfs.ErrNotFound, datastore.ErrNoSnapshot, thinprov.ErrNotFound, vmfs.ErrNotVolume, fs.ErrNotExist}},
	} {
		for _, e := range c.errs {
			if errors.Is(err, e) {
				return c.code
			}
		}
	}
	return exitFailed
}

// message turns an error into one line that says what to do.
func message(err error) string {
	switch {
	case errors.Is(err, context.Canceled):
		return "interrupted"
	case errors.Is(err, lease.ErrNameInUse):
		return err.Error() + ": stop that server, or give this one another --host-name"
	case errors.Is(err, vmfs.ErrNotVolume):
		return err.Error() + ": make one with basalt fs create"
	}
	return err.Error()
}
