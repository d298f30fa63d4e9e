package qmp

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// MaxMessageBytes bounds one message. Replies grow with the number of devices
// and block nodes: the largest known are some hundred KiB.
const MaxMessageBytes = 8 << 20

// Errors of the decoder.
var (
	// ErrProtocol: the peer does not speak QMP.
	ErrProtocol = errors.New("qmp: malformed message")
	// ErrTooLong: a message is longer than MaxMessageBytes.
	ErrTooLong = errors.New("qmp: message too long")
)

// Version of the QEMU at the other end.
type Version struct {
	Major, Minor, Micro int
	Package             string // the distributor's version
}

// AtLeast compares major and minor.
func (v Version) AtLeast(major, minor int) bool {
	return v.Major > major || v.Major == major && v.Minor >= minor
}

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro) }

// Event is something that happened without being asked for. Events are hints:
// some may be lost, so decide on what a query says.
type Event struct {
	Name string // "STOP", "SHUTDOWN", …
	Data json.RawMessage
	At   time.Time // by the host's wall clock, as QEMU saw it; zero if QEMU did not say
	// Lost counts earlier events that were dropped because nobody read them and
	// that no event has reported yet.
	Lost int
}

// Error is a command's refusal by QEMU.
type Error struct {
	Command string
	Class   string // "GenericError", "CommandNotFound", "DeviceNotActive", …
	Desc    string
}

func (e *Error) Error() string {
	return fmt.Sprintf("qmp: %s: %s (%s)", e.Command, e.Desc, e.Class)
}

// Message is what a QEMU sends: exactly one of Greeting, Event, Return and
// Refusal is set.
type Message struct {
	Greeting *Version
	Event    *Event
	Return   json.RawMessage
	Refusal  *Error // without Command, which the wire does not tell
	ID       uint64 // of Return and Refusal; 0 when the reply has none
}

// The wire forms. Fields not listed are ignored, as the specification demands.
type wireMessage struct {
	QMP *struct {
		Version struct {
			QEMU    struct{ Major, Minor, Micro int }
			Package string
		}
	}
	Event     *string
	Data      json.RawMessage
	Timestamp struct{ Seconds, Microseconds int64 }
	Return    json.RawMessage
	Error     *struct{ Class, Desc string }
	ID        *uint64
}

// Decoder reads messages from a stream.
type Decoder struct {
	bound *boundReader
	json  *json.Decoder
}

// NewDecoder reads from r, which it may read ahead.
func NewDecoder(r io.Reader) *Decoder {
	b := &boundReader{r: r}
	return &Decoder{bound: b, json: json.NewDecoder(b)}
}

// Next returns the next message: ErrProtocol, ErrTooLong, or the reader's error
// end the stream for good.
func (d *Decoder) Next() (Message, error) {
	d.bound.left = MaxMessageBytes
	var w wireMessage
	if err := d.json.Decode(&w); err != nil {
		_, isSyntax := errors.AsType[*json.SyntaxError](err)
		_, isType := errors.AsType[*json.UnmarshalTypeError](err)
		if isSyntax || isType {
			return Message{}, fmt.Errorf("%w: %w", ErrProtocol, err)
		}
		return Message{}, err
	}
	return w.message()
}

func (w *wireMessage) message() (Message, error) {
	var m Message
	if w.ID != nil {
		if *w.ID == 0 {
			return m, fmt.Errorf("%w: id 0 was never sent", ErrProtocol)
		}
		m.ID = *w.ID
	}
	kinds := 0
	if w.QMP != nil {
		kinds++
		v := w.QMP.Version
		m.Greeting = &Version{Major: v.QEMU.Major, Minor: v.QEMU.Minor, Micro: v.QEMU.Micro, Package: v.Package}
	}
	if w.Event != nil {
		kinds++
		m.Event = &Event{Name: *w.Event, Data: w.Data}
		// QEMU sends -1 when its clock failed.
		if t := w.Timestamp; t.Seconds > 0 {
			m.Event.At = time.Unix(t.Seconds, t.Microseconds*1000)
		}
	}
	if w.Return != nil {
		kinds++
		m.Return = w.Return
	}
	if w.Error != nil {
		kinds++
		m.Refusal = &Error{Class: w.Error.Class, Desc: w.Error.Desc}
	}
	if kinds != 1 {
		return Message{}, fmt.Errorf("%w: %d of QMP, event, return and error", ErrProtocol, kinds)
	}
	return m, nil
}

// boundReader fails once a message took more than its share. The JSON decoder
// reads ahead, so the share counts from the last message's end in the buffer.
type boundReader struct {
	r    io.Reader
	left int
}

func (b *boundReader) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, ErrTooLong
	}
	n, err := b.r.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}
