package faultdev

import (
	"fmt"
	"strings"

	"basalt/block"
)

// Ops is a set of operations.
type Ops uint

// The operations of block.Device.
const (
	Read Ops = 1 << iota
	Write
	FUA
	Flush
	Zeroes
	Discard
	CAW

	Changes = Write | FUA | Flush | Zeroes | Discard | CAW
	Any     = Read | Changes
)

// String lists the operations, as in "write,flush"; "none" for the empty set.
func (o Ops) String() string {
	var have []string
	for i, name := range []string{"read", "write", "fua", "flush", "zeroes", "discard", "caw"} {
		if o&(1<<i) != 0 {
			have = append(have, name)
		}
	}
	if len(have) == 0 {
		return "none"
	}
	return strings.Join(have, ",")
}

// Effect is what a rule does to an operation.
type Effect int

// The effects. Each has a meaning for some operations only; a rule does not meet
// the others, whatever its Ops say.
const (
	// FailBefore returns Rule.Err and does nothing.
	FailBefore Effect = iota + 1
	// FailAfter carries the operation out and returns Rule.Err: the reply is lost.
	FailAfter
	// Delay waits for Device.Release before it carries the operation out.
	Delay
	// Late returns Rule.Err at once; the operation lands at Device.Release. It
	// meets changes.
	Late
	// Torn carries out only the first Rule.Blocks logical blocks, and returns
	// Rule.Err, with nil for success. It meets Write, FUA, Zeroes and Discard.
	Torn
	// Lost reports success and does nothing. It meets changes.
	Lost
	// Misdirect carries the operation out at Rule.ToBytes. It meets all but Flush.
	Misdirect
	// BlindCAW writes the unit without comparing. It meets CAW.
	BlindCAW
)

// String names the effect.
func (e Effect) String() string {
	switch e {
	case FailBefore:
		return "fail before"
	case FailAfter:
		return "fail after"
	case Delay:
		return "delay"
	case Late:
		return "late"
	case Torn:
		return "torn"
	case Lost:
		return "lost"
	case Misdirect:
		return "misdirect"
	case BlindCAW:
		return "blind caw"
	default:
		return fmt.Sprintf("effect %d", int(e))
	}
}

// meets are the operations that the effect has a meaning for.
func (e Effect) meets() Ops {
	switch e {
	case FailBefore, FailAfter, Delay:
		return Any
	case Late, Lost:
		return Changes
	case Torn:
		return Write | FUA | Zeroes | Discard
	case Misdirect:
		return Any &^ Flush
	case BlindCAW:
		return CAW
	default:
		return 0
	}
}

// Rule makes some operations go wrong.
type Rule struct {
	Ops    Ops         // which operations; default Any
	Within block.Range // only operations that touch it; LenBytes 0: anywhere
	Nth    int         // which of the operations that meet the rule, from 1; 0: each
	Effect Effect

	Err     error // what the caller gets; default ErrInjected, except for Torn
	Blocks  int   // Torn: how many leading logical blocks are carried out
	ToBytes int64 // Misdirect: where to
}

func (r *Rule) failure() error {
	if r.Err != nil {
		return r.Err
	}
	return ErrInjected
}

// meets tells whether the rule is about such an operation.
func (r *Rule) meets(c call) bool {
	ops := r.Ops
	if ops == 0 {
		ops = Any
	}
	if ops&r.Effect.meets()&c.op == 0 {
		return false
	}
	w := r.Within
	return w.LenBytes == 0 || c.span.OffBytes < w.OffBytes+w.LenBytes && w.OffBytes < c.span.OffBytes+c.span.LenBytes
}
