package simdev

import (
	"bytes"
	"math/rand/v2"

	"basalt/block"
)

// changeKind is how a change acts on a store.
type changeKind int

const (
	changeWrite changeKind = iota
	changeZero
	changeGarble
)

// change is one operation's effect on a store.
type change struct {
	kind   changeKind
	span   block.Range
	data   []byte // of changeWrite; not shared with the caller
	seed   uint64 // of changeGarble
	forced bool   // already on stable media: FUA and compare-and-write
}

// apply carries the change out on the part of its span that is given.
func (c *change) apply(s *store, part block.Range) {
	switch c.kind {
	case changeWrite:
		from := part.OffBytes - c.span.OffBytes
		s.write(c.data[from:from+part.LenBytes], part.OffBytes)
	case changeZero:
		s.zero(part.OffBytes, part.LenBytes)
	case changeGarble:
		s.garble(part.OffBytes, part.LenBytes, c.seed)
	}
}

// cache is the durable content and, in the order of their completion, the changes
// that it lacks. A forced change waits here too while an older volatile one is
// before it: applying both in order is what keeps the older from overwriting the
// newer after a power failure.
type cache struct {
	durable    *store
	pending    []*change
	bytes      int64 // memory of pending
	limitBytes int64
}

// changeOverheadBytes is the memory of a change besides its data, roughly.
const changeOverheadBytes = 128

func (c *cache) add(ch *change) {
	c.pending = append(c.pending, ch)
	c.bytes += int64(len(ch.data)) + changeOverheadBytes
	for len(c.pending) > 0 && (c.pending[0].forced || c.bytes > c.limitBytes) {
		c.writeBackOldest()
	}
}

func (c *cache) writeBackOldest() {
	ch := c.pending[0]
	ch.apply(c.durable, ch.span)
	c.bytes -= int64(len(ch.data)) + changeOverheadBytes
	c.pending[0] = nil
	c.pending = c.pending[1:]
}

func (c *cache) flush() {
	for len(c.pending) > 0 {
		c.writeBackOldest()
	}
	c.pending = nil
}

// clone shares the changes, which never change themselves.
func (c *cache) clone() cache {
	return cache{
		durable:    c.durable.clone(),
		pending:    append([]*change(nil), c.pending...),
		bytes:      c.bytes,
		limitBytes: c.limitBytes,
	}
}

// losePower keeps every forced change and of each other one all, nothing or some
// logical blocks. Keeping the order loses no outcome: whatever order a real cache
// writes back in, a block ends with one of its versions.
func (c *cache) losePower(rng *rand.Rand, logicalBytes int64) {
	for _, ch := range c.pending {
		if ch.forced {
			ch.apply(c.durable, ch.span)
			continue
		}
		for _, part := range survivors(rng, ch.span, logicalBytes) {
			ch.apply(c.durable, part)
		}
	}
	c.pending, c.bytes = nil, 0
}

// survivors chooses the parts of a change that reach the media: a third of the
// time nothing, a third all of it, else a torn one.
func survivors(rng *rand.Rand, span block.Range, logicalBytes int64) []block.Range {
	blocks := span.LenBytes / logicalBytes
	fate := rng.IntN(3)
	switch {
	case fate == 0 || blocks == 0:
		return nil
	case fate == 1 || blocks == 1:
		return []block.Range{span}
	}
	at := func(first, count int64) block.Range {
		return block.Range{OffBytes: span.OffBytes + first*logicalBytes, LenBytes: count * logicalBytes}
	}
	const scatterBlocks = 1024 // longer spans tear into a start and an end only
	if blocks > scatterBlocks || rng.IntN(2) == 0 {
		first := rng.Int64N(blocks + 1)
		if rng.IntN(2) == 0 {
			return []block.Range{at(0, first)}
		}
		return []block.Range{at(first, blocks-first)}
	}
	var parts []block.Range
	for i := range blocks {
		if rng.IntN(2) == 0 {
			parts = append(parts, at(i, 1))
		}
	}
	return parts
}

func newWrite(p []byte, offBytes int64) *change {
	return &change{
		kind: changeWrite,
		span: block.Range{OffBytes: offBytes, LenBytes: int64(len(p))},
		data: bytes.Clone(p),
	}
}
