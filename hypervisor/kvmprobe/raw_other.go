//go:build !amd64

package kvmprobe

import (
	"errors"
	"os"
)

// rawStage refuses: the guests are x86, which no other processor's KVM runs.
func rawStage(*os.File) error { return errors.New("the host's processor is not x86-64") }
