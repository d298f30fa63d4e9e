package qmp

import "context"

// RunState is QEMU's state of a machine (qapi/run-state.json), for instance
// "running", "paused", "io-error", "prelaunch", "shutdown".
type RunState string

// Run states that callers decide on.
const (
	StateRunning   RunState = "running"
	StatePaused    RunState = "paused"    // by stop
	StatePrelaunch RunState = "prelaunch" // started with -S and never continued
	StateIOError   RunState = "io-error"  // stopped by werror=stop or rerror=stop
)

// Status asks for the machine's state.
func (c *Client) Status(ctx context.Context) (RunState, error) {
	var r struct{ Status RunState }
	err := c.Execute(ctx, "query-status", nil, &r)
	return r.Status, err
}

// Cont runs the machine. After an I/O error it may stop again at once.
func (c *Client) Cont(ctx context.Context) error { return c.Execute(ctx, "cont", nil, nil) }

// Stop pauses the machine. It returns after running I/O has ended.
func (c *Client) Stop(ctx context.Context) error { return c.Execute(ctx, "stop", nil, nil) }

// Quit ends QEMU without telling the guest. QEMU may close the connection before
// it replies.
func (c *Client) Quit(ctx context.Context) error { return c.Execute(ctx, "quit", nil, nil) }

// Powerdown presses the guest's power button (ACPI). The guest may ignore it.
func (c *Client) Powerdown(ctx context.Context) error {
	return c.Execute(ctx, "system_powerdown", nil, nil)
}
