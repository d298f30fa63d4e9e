package guest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
)

// Kind tells the guest's console lines apart.
type Kind int

// Kinds of Line.
const (
	LineOther    Kind = iota // kernel messages and anything else
	LineReady                // "G ready": the disk is there
	LineAck                  // "W 12 850": record 12 is on the disk, after 850 µs
	LineVerified             // "V ok 12 torn=0": records up to 12 are there
	LineBad                  // "V bad 7 3 holds zeros": record 7 in block 3 is not
	LineError                // "G error no disk": the guest gives up
	LineDone                 // "G done": the guest powers off
)

// Line is one line of the guest's serial console.
type Line struct {
	Kind    Kind
	Seq     uint64        // LineAck, LineVerified, LineBad
	Latency time.Duration // LineAck: write plus fdatasync
	Torn    bool          // LineVerified
	Block   uint64        // LineBad
	Text    string        // LineBad and LineError: the reason; LineOther: the line
}

// String is the line as the guest prints it, without its end.
func (l Line) String() string {
	switch l.Kind {
	case LineReady:
		return "G ready"
	case LineAck:
		return fmt.Sprintf("W %d %d", l.Seq, l.Latency.Microseconds())
	case LineVerified:
		torn := 0
		if l.Torn {
			torn = 1
		}
		return fmt.Sprintf("V ok %d torn=%d", l.Seq, torn)
	case LineBad:
		return fmt.Sprintf("V bad %d %d %s", l.Seq, l.Block, l.Text)
	case LineError:
		return "G error " + l.Text
	case LineDone:
		return "G done"
	case LineOther:
		return l.Text
	default:
		return fmt.Sprintf("line of kind %d", int(l.Kind))
	}
}

// ParseLine reads one line. What does not have the form of a guest's line is
// LineOther.
func ParseLine(s string) Line {
	s = strings.TrimRight(s, "\r\n")
	if l, ok := parseGuestLine(s); ok {
		return l
	}
	return Line{Kind: LineOther, Text: s}
}

func parseGuestLine(s string) (Line, bool) {
	switch s {
	case "G ready":
		return Line{Kind: LineReady}, true
	case "G done":
		return Line{Kind: LineDone}, true
	}
	if text, ok := strings.CutPrefix(s, "G error "); ok {
		return Line{Kind: LineError, Text: text}, true
	}
	f := strings.SplitN(s, " ", 5)
	switch {
	case len(f) == 3 && f[0] == "W":
		seq, err1 := strconv.ParseUint(f[1], 10, 64)
		us, err2 := parseUint32(f[2])
		return Line{Kind: LineAck, Seq: seq, Latency: time.Duration(us) * time.Microsecond}, err1 == nil && err2 == nil
	case len(f) == 4 && f[0] == "V" && f[1] == "ok":
		seq, err := strconv.ParseUint(f[2], 10, 64)
		return Line{Kind: LineVerified, Seq: seq, Torn: f[3] == "torn=1"}, err == nil && (f[3] == "torn=0" || f[3] == "torn=1")
	case len(f) == 5 && f[0] == "V" && f[1] == "bad":
		seq, err1 := strconv.ParseUint(f[2], 10, 64)
		block, err2 := strconv.ParseUint(f[3], 10, 64)
		return Line{Kind: LineBad, Seq: seq, Block: block, Text: f[4]}, err1 == nil && err2 == nil
	}
	return Line{}, false
}

// Console reads a guest's serial stream line by line.
type Console struct{ r *bufio.Reader }

// maxLine bounds a line; the rest of a longer one comes as further lines.
const maxLine = 4096

// NewConsole reads from r, which may start in the middle of a line.
func NewConsole(r io.Reader) *Console { return &Console{r: bufio.NewReaderSize(r, maxLine)} }

// Next returns the next line, or r's error. A line that the stream ends within is
// not a line: an acknowledgement cut short counts as none.
func (c *Console) Next() (Line, error) {
	b, err := c.r.ReadSlice('\n')
	if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
		return Line{}, err
	}
	return ParseLine(string(b)), nil
}
