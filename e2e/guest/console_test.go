package guest_test

import (
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"basalt/e2e/guest"
)

func TestLinesReadBack(t *testing.T) {
	for _, l := range []guest.Line{
		{Kind: guest.LineReady},
		{Kind: guest.LineAck, Seq: 12, Latency: 850 * time.Microsecond},
		{Kind: guest.LineVerified, Seq: 1 << 40},
		{Kind: guest.LineVerified, Seq: 0, Torn: true},
		{Kind: guest.LineBad, Seq: 7, Block: 3, Text: "holds record 5"},
		{Kind: guest.LineError, Text: "write record 9: input/output error"},
		{Kind: guest.LineDone},
		{Kind: guest.LineOther, Text: "[    0.0] Linux version"},
	} {
		if got := guest.ParseLine(l.String() + "\r\n"); got != l {
			t.Errorf("%q reads as %+v", l, got)
		}
	}
}

func TestGarbledLinesAcknowledgeNothing(t *testing.T) {
	for _, s := range []string{"W", "W 12", "W x 5", "W 12 5 6", "W -1 5", " W 12 5", "[ 1.0] W 12 5", "V ok 1", "V ok 1 torn=2", "V ok x torn=0", "V bad 1 2", "G readyish"} {
		if got := guest.ParseLine(s); got.Kind != guest.LineOther {
			t.Errorf("%q reads as %+v", s, got)
		}
	}
}

func TestConsoleYieldsWholeLinesOnly(t *testing.T) {
	stream := "SeaBIOS\r\nG ready\r\n" + strings.Repeat("x", 10000) + "\r\nW 1 10\r\nW 2 1"
	c := guest.NewConsole(iotest.OneByteReader(strings.NewReader(stream)))
	var kinds []guest.Kind
	var acked uint64
	for {
		l, err := c.Next()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			break
		}
		if len(l.Text) > 4096 {
			t.Errorf("a line of %d bytes", len(l.Text))
		}
		if l.Kind != guest.LineOther {
			kinds = append(kinds, l.Kind)
		}
		if l.Kind == guest.LineAck {
			acked = l.Seq
		}
	}
	if len(kinds) != 2 || acked != 1 {
		t.Errorf("kinds %v, acked %d; the cut-off line counts as none", kinds, acked)
	}
}

func TestOptionsReadBack(t *testing.T) {
	for _, o := range []guest.Options{
		{Mode: guest.ModeVerify, Blocks: guest.DefaultBlocks, Disk: "/dev/vda"},
		{Mode: guest.ModeWrite, Acked: 7, Count: 100, Delay: 20 * time.Millisecond, Blocks: 64, Disk: "/dev/vdb", Run: guest.RunID{0xab}},
	} {
		got, err := guest.ParseOptions("console=ttyS0 quiet " + o.String() + " panic=-1\n")
		if err != nil || got != o {
			t.Errorf("%q reads as %+v, %v", o, got, err)
		}
	}
	for _, s := range []string{"mode=dance", "gmax=x", "gmax=-1", "gdelay=1h", "gblocks=7", "gblocks=0", "grun=12", "acked="} {
		if _, err := guest.ParseOptions(s); err == nil {
			t.Errorf("%q is accepted", s)
		}
	}
}
