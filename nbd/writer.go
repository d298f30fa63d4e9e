package nbd

import (
	"fmt"
	"net"
	"sync"
)

// writer sends a connection's replies. Whoever finishes a request while nobody
// is writing becomes the writer and sends, in one call each time, everything
// that has gathered meanwhile; the others go back to work at once. There are
// never more replies waiting than requests in flight.
type writer struct {
	nc     net.Conn
	budget *budget

	mu      sync.Mutex // guards waiting, writing, ended
	waiting []*request
	writing bool
	ended   error // if set, nothing is sent any more, and this is why

	// The writing goroutine's own.
	sending []*request
	vec     net.Buffers
	cursor  net.Buffers // what WriteTo consumes; a field, so that it is not allocated
}

// send sends r's reply, or leaves it to the goroutine that is writing, and
// releases r. An error ends the writer and closes the connection.
func (w *writer) send(r *request) {
	w.mu.Lock()
	if w.ended != nil {
		w.mu.Unlock()
		w.budget.release(r)
		return
	}
	w.waiting = append(w.waiting, r)
	if w.writing {
		w.mu.Unlock()
		return
	}
	w.writing = true
	for len(w.waiting) > 0 {
		w.sending, w.waiting = w.waiting, w.sending[:0]
		drop := w.ended != nil
		w.mu.Unlock()
		if !drop {
			w.write()
		}
		for i, r := range w.sending {
			w.sending[i] = nil
			w.budget.release(r)
		}
		w.mu.Lock()
	}
	w.writing = false
	w.mu.Unlock()
}

// write sends the replies of w.sending.
func (w *writer) write() {
	w.vec = w.vec[:0]
	for _, r := range w.sending {
		w.vec = append(w.vec, r.head)
		if len(r.tail) > 0 {
			w.vec = append(w.vec, r.tail)
		}
	}
	w.cursor = w.vec
	if _, err := w.cursor.WriteTo(w.nc); err != nil {
		w.end(fmt.Errorf("nbd: replying to the client: %w", err))
	}
}

// end closes the connection. No reply is begun afterwards; one that is being
// written may still reach the client in part. The first cause stays.
func (w *writer) end(cause error) {
	w.mu.Lock()
	if w.ended == nil {
		w.ended = cause
	}
	w.mu.Unlock()
	// The peer learns all it needs from the end of the stream; the reader and a
	// blocked write end with an error.
	_ = w.nc.Close()
}

// cause is why the writer ended; nil: it has not.
func (w *writer) cause() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ended
}
