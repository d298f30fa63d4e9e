package hypervisor

import (
	"context"

	"basalt/hypervisor/kvmprobe"
)

// AccelKind is how the guest's instructions are executed.
type AccelKind string

// Kinds of AccelKind.
const (
	KVM AccelKind = "kvm" // by the processor
	TCG AccelKind = "tcg" // by translation: slow, runs everywhere
)

// Accel is the accelerator of a VM and why it was chosen.
type Accel struct {
	Kind   AccelKind `json:"kind"`
	Reason string    `json:"reason"`
}

func (a Accel) argument() string {
	if a.Kind == KVM {
		return "kvm"
	}
	return "tcg,thread=multi"
}

func (a Accel) cpu(s Spec) string {
	switch {
	case s.CPU != "":
		return s.CPU
	case a.Kind == KVM:
		return "host"
	default:
		return "max"
	}
}

// chooseAccel takes KVM only if it was proven with the very CPU model the VM
// will have.
func chooseAccel(ctx context.Context, s Spec, opts Options) Accel {
	if opts.ForceTCG {
		return Accel{Kind: TCG, Reason: "asked for"}
	}
	cpu := Accel{Kind: KVM}.cpu(s)
	v := opts.KVM
	if v == nil || v.CPU != cpu || v.QEMU != opts.QEMU {
		fresh := kvmprobe.Probe(ctx, opts.QEMU, cpu)
		v = &fresh
	}
	if v.OK {
		return Accel{Kind: KVM, Reason: v.Reason}
	}
	return Accel{Kind: TCG, Reason: "KVM is not usable: " + v.Reason}
}
