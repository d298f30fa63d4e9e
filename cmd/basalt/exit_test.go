package main

import (
	"errors"
	"fmt"
	"testing"

	"basalt/block"
	"basalt/store"
	"basalt/thinprov"
	"basalt/vmfs"
)

func TestExitCodesFollowTheContract(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, exitDone},
		{errors.New("anything"), exitFailed},
		{usagef("nonsense"), exitUsage},
		{fmt.Errorf("disk: %w", vmfs.ErrNotFound), exitNotFound},
		{&vmfs.HeldError{Path: "disk", HostName: "a"}, exitHeld},
		{fmt.Errorf("put: %w", vmfs.ErrNoSpace), exitNoSpace},
		{errors.Join(thinprov.ErrNoSpace, vmfs.ErrNoSpace), exitNoSpace},
		{fmt.Errorf("open: %w", &block.CorruptError{Object: "header"}), exitDamaged},
		{errors.Join(vmfs.ErrNotFound, &block.CorruptError{Object: "header"}), exitDamaged},
		{&store.RemoteError{Code: exitNotFound, Message: "said the holder"}, exitNotFound},
	} {
		if got := exitCode(c.err); got != c.want {
			t.Errorf("%v: exit code %d, want %d", c.err, got, c.want)
		}
	}
}
