package guest

import "fmt"

// Limits of a ring's length in blocks.
const (
	MinBlocks = 8
	MaxBlocks = 1 << 24 // 64 GiB
)

// Layout places records. Odd ones fill the first half of the ring in order, even
// ones the second half scattered, so that a thin disk sees both kinds of
// allocation; each further pass overwrites the ring in place.
type Layout struct {
	Blocks uint64 // even, MinBlocks..MaxBlocks
}

// Validate reports a length that cannot be a ring.
func (l Layout) Validate() error {
	if l.Blocks < MinBlocks || l.Blocks > MaxBlocks || l.Blocks%2 != 0 {
		return fmt.Errorf("guest: a ring of %d blocks; want an even number in %d..%d", l.Blocks, MinBlocks, MaxBlocks)
	}
	return nil
}

// BlockOf returns where record seq, which is at least 1, lives.
func (l Layout) BlockOf(seq uint64) uint64 {
	half := l.Blocks / 2
	i := (seq - 1) / 2 % half
	if seq%2 == 1 {
		return i
	}
	return half + i*l.stride()%half
}

// SeqAt returns the newest record up to last that lives in block, or 0.
func (l Layout) SeqAt(block, last uint64) uint64 {
	half := l.Blocks / 2
	var first uint64 // the first pass's record here
	if block < half {
		first = 2*block + 1
	} else {
		first = 2*((block-half)*inverse(l.stride(), half)%half) + 2
	}
	if last < first {
		return 0
	}
	return last - (last-first)%l.Blocks
}

// stride is near the golden section of half a ring and coprime to it, so that a
// pass visits each block once and neighbours in time are far apart on disk.
func (l Layout) stride() uint64 {
	half := l.Blocks / 2
	s := half*618/1000 | 1
	for gcd(s, half) != 1 {
		s += 2
	}
	return s % half
}

func gcd(a, b uint64) uint64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// inverse returns x with a*x = 1 modulo m, for a coprime to m, both below 2^32.
func inverse(a, m uint64) uint64 {
	r0, r1 := int64(m), int64(a%m)
	t0, t1 := int64(0), int64(1)
	for r1 != 0 {
		q := r0 / r1
		r0, r1 = r1, r0-q*r1
		t0, t1 = t1, t0-q*t1
	}
	return uint64((t0 + int64(m)) % int64(m))
}
