package nbd

import (
	"math/bits"
	"sync"

	"basalt/block"
	"basalt/nbd/wire"
)

const (
	maxInFlight      = 128      // requests of one connection
	maxInFlightBytes = 64 << 20 // of their buffers; two of the largest

	minBufferShift = 12 // 4 KiB
	bufferClasses  = 14 // 4 KiB .. 32 MiB, powers of two
)

var _ = [1]struct{}{}[1<<(minBufferShift+bufferClasses-1)-wire.MaxPayload] // the largest class holds a payload

// budget is one connection's allowance of requests in flight and of aligned
// buffers for them. Only the connection's reader acquires; workers release.
// Unused buffers stay with the connection, so that no other export's data can
// ever be in them, until the garbage collector takes them from the pools.
type budget struct {
	mu       sync.Mutex // guards requests, bytes
	freed    sync.Cond  // signalled when either shrinks
	requests int
	bytes    int

	slots sync.Pool                // of *request
	pools [bufferClasses]sync.Pool // of *buffer, by class
}

// buffer is a whole class of memory; data is the part in use.
type buffer struct {
	whole []byte
	data  []byte
	class int
}

func newBudget() *budget {
	b := &budget{}
	b.freed.L = &b.mu
	return b
}

// acquire waits until a request with a buffer of lenBytes fits and returns it. A
// length of 0 is a request without a buffer.
func (b *budget) acquire(lenBytes int) *request {
	class := classOf(lenBytes)
	b.mu.Lock()
	for b.requests == maxInFlight || b.bytes+classBytes(class) > maxInFlightBytes {
		b.freed.Wait()
	}
	b.requests++
	b.bytes += classBytes(class)
	b.mu.Unlock()

	r, ok := b.slots.Get().(*request)
	if !ok {
		r = &request{}
	}
	if class >= 0 {
		buf, ok := b.pools[class].Get().(*buffer)
		if !ok {
			buf = &buffer{whole: block.AlignedBuffer(classBytes(class)), class: class}
		}
		buf.data = buf.whole[:lenBytes]
		r.buf = buf
	}
	return r
}

// release gives the request and its buffer back; the caller keeps neither.
func (b *budget) release(r *request) {
	class := -1
	if r.buf != nil {
		class = r.buf.class
		b.pools[class].Put(r.buf)
	}
	*r = request{head: r.head[:0]}
	b.slots.Put(r)

	b.mu.Lock()
	defer b.mu.Unlock()
	b.requests--
	b.bytes -= classBytes(class)
	b.freed.Signal()
}

// classOf is the smallest class that holds n bytes, -1 for none.
func classOf(n int) int {
	if n == 0 {
		return -1
	}
	return max(0, bits.Len(uint(n-1))-minBufferShift)
}

func classBytes(class int) int {
	if class < 0 {
		return 0
	}
	return 1 << (minBufferShift + class)
}
