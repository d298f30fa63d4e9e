package thinprov_test

import (
	"bytes"
	"encoding/binary"
	"slices"
)

// cell is what a sector may hold: cur, or after a power failure one of alts.
type cell struct {
	cur  uint32
	alts []uint32
}

func (c *cell) allows(id uint32) bool { return c.cur == id || slices.Contains(c.alts, id) }

// set makes id the content; what was there before may come back until a flush.
func (c *cell) set(id uint32) {
	if c.cur != id {
		c.alts = append(c.alts, c.cur)
	}
	c.cur = id
}

func (c *cell) durable() { c.alts = nil }

// maybe notes a write that failed: it may have happened.
func (c *cell) maybe(id uint32) { c.alts = append(c.alts, id) }

func fill(p []byte, ids []uint32) {
	for i, id := range ids {
		s := p[i*sector : (i+1)*sector]
		binary.LittleEndian.PutUint32(s, id)
		for n := 4; n < sector; n *= 2 {
			copy(s[n:], s[:n])
		}
	}
}

// ids reads back what fill wrote. A sector of mixed content gives ^0.
func ids(p []byte) []uint32 {
	out := make([]uint32, len(p)/sector)
	for i := range out {
		s := p[i*sector : (i+1)*sector]
		out[i] = binary.LittleEndian.Uint32(s)
		if !bytes.Equal(s[4:], s[:sector-4]) {
			out[i] = ^uint32(0)
		}
	}
	return out
}
