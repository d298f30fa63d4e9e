package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// host is a running "basalt disk serve".
type host struct {
	name   string
	socket string // of NBD
	log    string // path of its output
	cmd    *exec.Cmd
	lines  *follower
	ended  context.Context // ends with the process, whose end is the cause
}

const (
	hostStart = 30 * time.Second
	hostStop  = 30 * time.Second
	killWait  = 10 * time.Second // for a killed process to be gone
)

// startHost starts a host and waits until it serves.
func (d *demo) startHost(ctx context.Context, name string) (*host, error) {
	// The whole folder of the socket is visible to the guest's QEMU.
	folder := filepath.Join(d.dir, name)
	if err := os.Mkdir(folder, 0o711); err != nil {
		return nil, err
	}
	h := &host{name: name, socket: filepath.Join(folder, "nbd.sock"), log: filepath.Join(d.dir, name+".log")}
	out, err := os.OpenFile(h.log, os.O_CREATE|os.O_EXCL|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	if h.lines, err = follow(h.log); err != nil {
		return nil, err
	}
	d.later("close the log of "+name, func(context.Context) error { return h.lines.Close() })
	args := []string{"disk", "serve", d.lun, "--nbd", "unix:" + h.socket, "--host-name", name,
		"--run-dir", d.runDir, "--nbd-owner", fmt.Sprintf("%d:%d", d.uid, d.gid)}
	h.cmd = exec.Command(d.basalt, args...)
	h.cmd.Stdout, h.cmd.Stderr = out, out
	// A session of its own: Ctrl-C is the demo's to act on, and a closed terminal
	// does not end a host that is to be kept.
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	d.n.say("$ basalt %s &", strings.Join(args, " "))
	if err := h.cmd.Start(); err != nil {
		return nil, err
	}
	ended, end := context.WithCancelCause(context.Background())
	h.ended = ended
	go func() { // ends with the process, which d.later ends and waits for
		err := h.cmd.Wait()
		end(fmt.Errorf("%s has ended (%s): %w", name, h.cmd.ProcessState, errors.Join(err, errEnded)))
	}()
	d.later("end "+name, h.kill)
	line, err := h.await(ctx, hostStart, "to serve", func(l string) bool { return strings.Contains(l, " serves on ") })
	if err != nil {
		return nil, err
	}
	d.n.show(line)
	return h, nil
}

// errEnded is in the cause of host.ended, however the process ended.
var errEnded = errors.New("process ended")

// await reads the host's output up to a line that fits.
func (h *host) await(ctx context.Context, limit time.Duration, what string, fits func(string) bool) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("nothing within %v", limit))
	defer cancel()
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	defer context.AfterFunc(h.ended, func() { end(context.Cause(h.ended)) })()
	for {
		line, err := h.lines.Next(ctx)
		if err != nil {
			return "", fmt.Errorf("waiting for %s %s: %w", h.name, what, err)
		}
		if fits(line) {
			return line, nil
		}
	}
}

// kill ends the process without asking it.
func (h *host) kill(ctx context.Context) error {
	if h.ended.Err() != nil {
		return nil
	}
	if err := h.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return h.wait(ctx)
}

func (h *host) wait(ctx context.Context) error {
	select {
	case <-h.ended.Done():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for process %d of %s to end: %w", h.cmd.Process.Pid, h.name, context.Cause(ctx))
	}
}

// stop ends the host as an operator does, who expects exit code 0.
func (h *host) stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, hostStop)
	defer cancel()
	if err := h.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop %s: %w: %w", h.name, err, context.Cause(h.ended))
	}
	if err := h.wait(ctx); err != nil {
		return err
	}
	if !h.cmd.ProcessState.Success() {
		return fmt.Errorf("%s did not stop cleanly: %s", h.name, h.cmd.ProcessState)
	}
	return nil
}
