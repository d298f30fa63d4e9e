package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// confirm asks before data is destroyed. Without a terminal and without --yes it
// refuses.
func (a *app) confirm(format string, args ...any) error {
	if a.yes {
		return nil
	}
	what := fmt.Sprintf(format, args...)
	if !isTerminal(a.in) {
		return usagef("this would %s; give --yes to do it", what)
	}
	fmt.Fprintf(a.err, "This will %s. Type yes to go on: ", what)
	line, err := bufio.NewReader(a.in).ReadString('\n')
	if err != nil && err != io.EOF {
		return err
	}
	if strings.TrimSpace(line) != "yes" {
		return usagef("not confirmed; nothing was done")
	}
	return nil
}

// isTerminal reports whether a stream is a person's.
func isTerminal(s any) bool {
	f, ok := s.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// progress shows how far a long operation has come: on a terminal in place, else a
// line now and then.
type progress struct {
	a       *app
	what    string
	total   int64 // bytes; 0: unknown
	last    int64
	started int64 // clock, nanoseconds
	shown   bool
}

// progressAfter and progressEvery pace the lines, in nanoseconds.
const (
	progressAfter      = 1e9
	progressEvery      = 5e9
	progressOnTerminal = 2e8
)

func (a *app) progress(what string, total int64) *progress {
	now := int64(a.clk.Now())
	return &progress{a: a, what: what, total: total, started: now, last: now}
}

func (p *progress) at(done int64) {
	now := int64(p.a.clk.Now())
	every := int64(progressEvery)
	if isTerminal(p.a.err) {
		every = progressOnTerminal
	}
	if now-p.started < progressAfter || now-p.last < every {
		return
	}
	p.last, p.shown = now, true
	text := fmt.Sprintf("%s: %s", p.what, bytesText(done))
	if p.total > 0 {
		text += fmt.Sprintf(" of %s (%d %%)", bytesText(p.total), done*100/p.total)
	}
	if isTerminal(p.a.err) {
		fmt.Fprintf(p.a.err, "\r%s\x1b[K", text)
		return
	}
	fmt.Fprintln(p.a.err, text)
}

// end leaves the terminal's line.
func (p *progress) end() {
	if p.shown && isTerminal(p.a.err) {
		fmt.Fprintln(p.a.err)
	}
}
