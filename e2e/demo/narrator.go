package main

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"basalt/internal/clock"
)

// narrator prints the story, each line with the seconds since its start.
type narrator struct {
	w       io.Writer
	clk     clock.Clock
	started clock.Instant
	short   *strings.Replacer // of long paths
	rows    [][3]string
}

func newNarrator(w io.Writer, clk clock.Clock) *narrator {
	return &narrator{w: w, clk: clk, started: clk.Now(), short: strings.NewReplacer()}
}

// abbreviate makes the story call a folder by a name.
func (n *narrator) abbreviate(folder, name string) {
	n.short = strings.NewReplacer(folder, name)
}

// say prints one line. What it says has happened when it is printed.
func (n *narrator) say(format string, args ...any) {
	text := n.short.Replace(fmt.Sprintf(format, args...))
	fmt.Fprintf(n.w, "%6.1f s  %s\n", n.clk.Now().Sub(n.started).Seconds(), text)
}

// show prints lines below the last one said.
func (n *narrator) show(text string) {
	for line := range strings.Lines(strings.TrimRight(text, "\n") + "\n") {
		fmt.Fprintf(n.w, "          | %s", n.short.Replace(line))
	}
}

// row adds a line to the summary.
func (n *narrator) row(what, promise, measured string) {
	n.rows = append(n.rows, [3]string{what, promise, measured})
}

// summary prints the rows as a table.
func (n *narrator) summary() {
	table := append([][3]string{{"WHAT", "PROMISE", "MEASURED"}}, n.rows...)
	var width [3]int
	for _, r := range table {
		for i, cell := range r {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	fmt.Fprintln(n.w)
	for _, r := range table {
		line := ""
		for i, cell := range r {
			line += cell + strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell)+2)
		}
		fmt.Fprintln(n.w, strings.TrimRight(line, " "))
	}
}

// seconds writes a duration with the digits that a person reads.
func seconds(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// mebibytes writes a number of bytes in MiB, or GiB when it is some.
func mebibytes(n int64) string {
	unit, size := "MiB", float64(n)/(1<<20)
	if n >= 1<<30 {
		unit, size = "GiB", float64(n)/(1<<30)
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", size), ".0") + " " + unit
}
