package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// commandLimit bounds any one command.
const commandLimit = 2 * time.Minute

// basaltCommand runs one basalt command in view of the reader and returns its
// output and how long it took, the start of its process included.
func (d *demo) basaltCommand(ctx context.Context, args ...string) (string, time.Duration, error) {
	d.n.say("$ basalt %s", strings.Join(args, " "))
	began := d.clk.Now()
	out, err := runCommand(ctx, d.basalt, append(args, "--host-name", "operator", "--run-dir", d.runDir)...)
	return string(out), d.clk.Now().Sub(began), err
}

// ask runs a basalt command with --json, unseen, and decodes its answer.
func (d *demo) ask(ctx context.Context, answer any, args ...string) error {
	out, err := runCommand(ctx, d.basalt, append(args, "--json", "--host-name", "operator", "--run-dir", d.runDir)...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(out, answer); err != nil {
		return fmt.Errorf("basalt %s --json: %w", strings.Join(args, " "), err)
	}
	return nil
}

// runCommand runs a program and returns its standard output. The error holds what
// it said on the other stream.
func runCommand(ctx context.Context, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	// Out of the terminal's reach, and ended in a way that lets it clean up.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = killWait
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(errs.String()+string(out)))
	}
	return out, nil
}
