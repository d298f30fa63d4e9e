package simdev

import (
	"encoding/binary"
	"maps"
)

const pageBytes = 4096

// page is the unit of sparse storage. Only the store that owns it may write to it,
// and no other store has it then.
type page struct {
	owner *store
	data  [pageBytes]byte
}

// store is sparse content; what has no page is zero.
type store struct {
	pages map[int64]*page // by page number
}

func newStore() *store { return &store{pages: make(map[int64]*page)} }

// clone costs one map entry for each page. The pages are shared afterwards and
// owned by neither store. A page that s does not own is shared already, and other
// stores may be looking at it.
func (s *store) clone() *store {
	for _, p := range s.pages {
		if p.owner == s {
			p.owner = nil
		}
	}
	return &store{pages: maps.Clone(s.pages)}
}

// own returns the page for writing, made or copied as needed.
func (s *store) own(number int64) *page {
	p := s.pages[number]
	switch {
	case p == nil:
		p = &page{owner: s}
	case p.owner != s:
		p = &page{owner: s, data: p.data}
	default:
		return p
	}
	s.pages[number] = p
	return p
}

// eachPage calls do with every page number that the span touches and the part of
// the page within it.
func eachPage(offBytes, lenBytes int64, do func(number int64, from, to int)) {
	for lenBytes > 0 {
		from := offBytes % pageBytes
		n := min(lenBytes, pageBytes-from)
		do(offBytes/pageBytes, int(from), int(from+n))
		offBytes, lenBytes = offBytes+n, lenBytes-n
	}
}

func (s *store) read(p []byte, offBytes int64) {
	eachPage(offBytes, int64(len(p)), func(number int64, from, to int) {
		n := to - from
		if have := s.pages[number]; have != nil {
			copy(p[:n], have.data[from:to])
		} else {
			clear(p[:n])
		}
		p = p[n:]
	})
}

func (s *store) write(p []byte, offBytes int64) {
	eachPage(offBytes, int64(len(p)), func(number int64, from, to int) {
		n := to - from
		copy(s.own(number).data[from:to], p[:n])
		p = p[n:]
	})
}

// eachHeld is eachPage over the pages that exist. A long span costs no more than
// the number of pages; do must not depend on their order.
func (s *store) eachHeld(offBytes, lenBytes int64, do func(number int64, from, to int)) {
	if lenBytes/pageBytes <= int64(len(s.pages)) {
		eachPage(offBytes, lenBytes, func(number int64, from, to int) {
			if s.pages[number] != nil {
				do(number, from, to)
			}
		})
		return
	}
	end := offBytes + lenBytes
	for number := range s.pages {
		start := number * pageBytes
		from, to := max(offBytes, start), min(end, start+pageBytes)
		if from < to {
			do(number, int(from-start), int(to-start))
		}
	}
}

func (s *store) zero(offBytes, lenBytes int64) {
	s.eachHeld(offBytes, lenBytes, func(number int64, from, to int) {
		if to-from == pageBytes {
			delete(s.pages, number)
			return
		}
		clear(s.own(number).data[from:to])
	})
}

// garble fills the existing pages of the span with bytes that depend on seed and
// address only. Holes stay zero, which discarded blocks may read as too.
func (s *store) garble(offBytes, lenBytes int64, seed uint64) {
	s.eachHeld(offBytes, lenBytes, func(number int64, from, to int) {
		data := s.own(number).data[from:to]
		for i := 0; i < len(data); i += 8 { // spans are whole blocks, so whole words
			word := mix(seed ^ mix(uint64(number*pageBytes)+uint64(from+i)))
			binary.LittleEndian.PutUint64(data[i:], word)
		}
	})
}

// mix is the finaliser of SplitMix64.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
