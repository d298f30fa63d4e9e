// Command demo is a guided run of Basalt on one machine: two hosts with one
// volume, a real guest that writes through one of them, a snapshot and a clone
// taken meanwhile, the death of that host, and the other one going on with the
// guest's disk. It believes nothing it has not read back.
//
// It exits with 0 only if every promise was kept, and then prints what was
// promised and what was measured; all numbers are of that very run. With KEEP=1 in
// the environment the second host and the guest are left running, and it says how
// to go on and how to end them.
//
// Invariants: every process it starts is in demo.undo from the moment it runs, and
// is ended by its own process id, on success, failure and signals alike; nothing
// outside its one temporary folder is written.
package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"

	"basalt/internal/clock"
)

func main() {
	os.Exit(run())
}

func run() int {
	// A reader of the output that goes away ends the run like Ctrl-C does, instead
	// of killing it before it has cleaned up.
	ctx, stop := signal.NotifyContext(context.Background(),
		syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE)
	defer stop()
	n := newNarrator(os.Stdout, clock.System{})
	d, err := newDemo(n, os.Getenv("KEEP") == "1")
	if err != nil {
		n.say("FAILED: %v", err)
		return 1
	}
	err = d.play(ctx)
	switch {
	case ctx.Err() != nil:
		n.say("interrupted; ending what was started")
		err = ctx.Err()
	case err != nil:
		n.say("FAILED: %v", err)
		d.printLogs()
		if d.keepLogs = d.keep; d.keepLogs {
			n.say("KEEP=1: the processes are ended, the files stay in %s", d.dir)
		}
	case d.keep:
		d.printHints()
		return 0
	}
	if errors.Join(err, d.cleanUp()) != nil {
		return 1
	}
	return 0
}
