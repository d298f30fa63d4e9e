package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"basalt/datastore"
	"basalt/internal/clock"
	"basalt/lease"
	"basalt/store"
)

// app is one run of the program: its streams and the flags that all verbs share.
type app struct {
	in       io.Reader
	out, err io.Writer
	clk      clock.Clock
	log      *slog.Logger
	hostName string
	runDir   string
	json     bool
	yes      bool
}

// run parses and carries out one command line and returns its exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errs io.Writer) int {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	a := &app{in: in, out: out, err: errs, clk: clock.System{}}
	a.log = slog.New(slog.NewTextHandler(errs, &slog.HandlerOptions{Level: slog.LevelWarn}))
	root := a.root()
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errs)
	err := root.ExecuteContext(ctx)
	if err != nil {
		fmt.Fprintf(errs, "basalt: %s\n", strings.ReplaceAll(message(err), "\n", ": "))
	}
	return exitCode(err)
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "basalt",
		Short: "A clustered datastore on shared LUNs, and virtual machine disks on it",
		Long: `basalt manages volumes on shared LUNs and the thin disks on them.

Addresses: LUN is a file or a block device. LUN:/path names an object on its
volume, LUN:/path@snapshot a snapshot of a disk. Sizes: 512, 64K, 10G, 1T.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 held by another
host, 5 no space, 6 damaged.`,
		Version:       version(),
		SilenceUsage:  true,
		SilenceErrors: true,
		CompletionOptions: cobra.CompletionOptions{
			HiddenDefaultCmd: true,
		},
	}
	root.PersistentFlags().StringVar(&a.hostName, "host-name", defaultHostName(), "name of this host on the volume")
	root.PersistentFlags().StringVar(&a.runDir, "run-dir", store.DefaultRunDir, "folder of the control sockets")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(a.fsCommand(), a.diskCommand())
	root.RunE = groupHelp
	root.Args = noSuchVerb
	return root
}

func defaultHostName() string {
	name, err := os.Hostname()
	if err != nil {
		return ""
	}
	return name
}

// group is a command that only has verbs.
func group(use, short string, verbs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, RunE: groupHelp, Args: noSuchVerb}
	c.AddCommand(verbs...)
	return c
}

func groupHelp(c *cobra.Command, _ []string) error {
	if err := c.Help(); err != nil {
		return err
	}
	return usagef("%s needs a verb", c.CommandPath())
}

func noSuchVerb(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("%s has no verb %q; see %s --help", c.CommandPath(), args[0], c.CommandPath())
	}
	return nil
}

// args demands from lo to hi arguments (hi < 0: any number) and says what they are.
func args(lo, hi int) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) < lo || (hi >= 0 && len(args) > hi) {
			return usagef("%d arguments do not fit: basalt %s", len(args), strings.TrimPrefix(c.UseLine(), "basalt "))
		}
		return nil
	}
}

func (a *app) jsonFlag(c *cobra.Command) *cobra.Command {
	c.Flags().BoolVar(&a.json, "json", false, "machine-readable output")
	return c
}

func (a *app) yesFlag(c *cobra.Command) *cobra.Command {
	c.Flags().BoolVar(&a.yes, "yes", false, "do not ask before destroying data")
	return c
}

// host is who this run is on a volume. It tells when it has had to cut another host
// off.
func (a *app) host() store.Host {
	return store.Host{Name: a.hostName, RunDir: a.runDir, OnBreak: func(r lease.BreakReport) { a.reportBreak(a.err, r) }}
}

// version names the commit that the program was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			v = s.Value
		}
	}
	return v
}

// emit writes v as JSON.
func (a *app) emit(v any) error {
	enc := json.NewEncoder(a.out)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// items is how listings look in JSON.
type items[T any] struct {
	Items []T `json:"items"`
}

// objectAddress parses an address that must name an object.
func objectAddress(s string) (datastore.Address, error) {
	addr, err := datastore.ParseAddress(s)
	if err != nil {
		return addr, err
	}
	if addr.Path == "" {
		return addr, usagef("%q names a LUN; an object on it is written %s:/path", s, s)
	}
	return addr, nil
}

// plainAddress parses an address that names an object and no snapshot.
func plainAddress(s string) (datastore.Address, error) {
	addr, err := objectAddress(s)
	if err == nil && addr.Snapshot != "" {
		err = usagef("%q names a snapshot; this verb takes none", s)
	}
	return addr, err
}

// lunAddress parses an address that must name a LUN alone.
func lunAddress(s string) (string, error) {
	addr, err := datastore.ParseAddress(s)
	if err == nil && addr.Path != "" {
		err = usagef("%q names an object; this verb takes a LUN", s)
	}
	return addr.LUN, err
}
