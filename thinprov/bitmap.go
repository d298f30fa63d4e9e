package thinprov

import "math/bits"

// bitmap has a bit for each block of a slab.
type bitmap [4]uint64

func (m *bitmap) has(i uint64) bool { return m[i/64]>>(i%64)&1 != 0 }

// span is the mask of word w for bits [from,to) of the bitmap.
func span(w int, from, to uint64) uint64 {
	lo, hi := max(from, uint64(w)*64), min(to, uint64(w+1)*64)
	if lo >= hi {
		return 0
	}
	return (^uint64(0) >> (64 - (hi - lo))) << (lo % 64)
}

func (m *bitmap) set(from, to uint64) {
	for w := range m {
		m[w] |= span(w, from, to)
	}
}

func (m *bitmap) clear(from, to uint64) {
	for w := range m {
		m[w] &^= span(w, from, to)
	}
}

// all reports whether all bits of [from,to) are set.
func (m *bitmap) all(from, to uint64) bool {
	for w := range m {
		if s := span(w, from, to); m[w]&s != s {
			return false
		}
	}
	return true
}

// none reports whether no bit of [from,to) is set.
func (m *bitmap) none(from, to uint64) bool {
	for w := range m {
		if m[w]&span(w, from, to) != 0 {
			return false
		}
	}
	return true
}

func (m *bitmap) count() uint64 {
	n := 0
	for _, w := range m {
		n += bits.OnesCount64(w)
	}
	return uint64(n)
}

// firstClear is the first clear bit at or after from, 256 if there is none.
func (m *bitmap) firstClear(from uint64) uint64 {
	for w := int(from / 64); w < len(m); w++ {
		if free := ^m[w] & span(w, from, 256); free != 0 {
			return uint64(w*64 + bits.TrailingZeros64(free))
		}
	}
	return 256
}

// clearRun is how many of the at most n bits from i on are clear, without a gap.
func (m *bitmap) clearRun(i, n uint64) uint64 {
	got := uint64(0)
	for got < n && i+got < 256 && !m.has(i+got) {
		got++
	}
	return got
}
