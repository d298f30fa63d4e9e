package thinprov

// pins tells when all I/O that was begun before a moment has ended (R15). I/O is
// counted by the phase in which it began; a new phase begins with every bump.
type pins struct {
	first  uint64   // phase of counts[0], the oldest in which I/O is in progress
	counts []uint32 // I/O in progress by phase; the last is the current phase
}

// enter begins an I/O. The result goes to leave.
func (p *pins) enter() uint64 {
	if len(p.counts) == 0 {
		p.counts = append(p.counts, 0)
	}
	p.counts[len(p.counts)-1]++
	return p.first + uint64(len(p.counts)) - 1
}

func (p *pins) leave(phase uint64) {
	p.counts[phase-p.first]--
	p.trim()
}

func (p *pins) trim() {
	for len(p.counts) > 1 && p.counts[0] == 0 {
		p.counts = p.counts[1:]
		p.first++
	}
}

// bump begins a new phase and returns the one before it: once oldest is above it,
// all I/O begun so far has ended.
func (p *pins) bump() uint64 {
	if len(p.counts) == 0 {
		p.counts = append(p.counts, 0)
	}
	p.counts = append(p.counts, 0)
	last := p.first + uint64(len(p.counts)) - 2
	p.trim()
	return last
}

// oldest is the oldest phase in which I/O may be in progress.
func (p *pins) oldest() uint64 { return p.first }
