package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"basalt/block"
	"basalt/block/filedev"
	"basalt/datastore"
	"basalt/lease"
	"basalt/store"
	"basalt/vmfs"
)

func (a *app) fsCommand() *cobra.Command {
	return group("fs", "Volumes: create, inspect, check; folders and files on them",
		a.fsCreate(), a.fsInfo(), a.fsDF(), a.fsHosts(), a.fsCheck(), a.fsConfirmDown(),
		a.fsLs(), a.fsStat(), a.fsMkdir(), a.fsRm(), a.fsMv(), a.fsCat(), a.fsPut(), a.fsGet())
}

// withView runs f on the volume, opened for reading without a slot.
func (a *app) withView(ctx context.Context, lun string, f func(*datastore.Datastore) error) error {
	ds, err := store.View(ctx, lun, a.clk)
	if err != nil {
		return err
	}
	return errors.Join(f(ds), ds.Close(ctx))
}

// withMount runs f on the volume, mounted with a slot of its own for as long.
func (a *app) withMount(ctx context.Context, lun string, f func(*datastore.Datastore) error) error {
	ds, err := store.Mount(ctx, lun, a.host(), a.clk, a.log)
	if err != nil {
		return err
	}
	return errors.Join(f(ds), ds.Close(context.WithoutCancel(ctx)))
}

func (a *app) fsCreate() *cobra.Command {
	var size sizeFlag
	var label string
	var term time.Duration
	c := &cobra.Command{
		Use:   "create LUN",
		Short: "Make an empty volume on a LUN",
		Long: `Make an empty volume on a LUN. With --size, a sparse file of that size is
made first. Whatever is on an existing LUN is lost, so this asks, or takes --yes;
a volume that a host has mounted is refused.`,
		Args: args(1, 1),
		RunE: func(c *cobra.Command, args []string) error {
			lun, err := lunAddress(args[0])
			if err != nil {
				return err
			}
			return a.createVolume(c.Context(), lun, int64(size), vmfs.FormatOptions{Label: label, Lease: term})
		},
	}
	c.Flags().Var(&size, "size", "make a sparse file of this size")
	c.Flags().StringVar(&label, "label", "", "name of the volume, for people")
	c.Flags().DurationVar(&term, "lease", lease.DefaultLease, "how long a silent host is waited for; 3s finds a dead one faster")
	return a.yesFlag(c)
}

func (a *app) createVolume(ctx context.Context, lun string, size int64, opts vmfs.FormatOptions) error {
	if opts.Lease < lease.MinLease || opts.Lease > lease.MaxLease {
		return usagef("a lease of %v; want %v to %v", opts.Lease, lease.MinLease, lease.MaxLease)
	}
	_, err := os.Stat(lun)
	exists := err == nil
	switch {
	case !exists && errors.Is(err, fs.ErrNotExist) && size > 0:
		if size < vmfs.MinVolumeBytes || size%4096 != 0 {
			return usagef("a LUN of %s; want at least %s, in multiples of 4K", bytesText(size), bytesText(vmfs.MinVolumeBytes))
		}
		if err := filedev.Create(lun, size); err != nil {
			return err
		}
	case !exists && errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s: %w: give --size to make a file", lun, vmfs.ErrNotFound)
	case !exists:
		return err
	case size > 0:
		return usagef("%s exists; --size is for a new file", lun)
	}
	dev, err := store.OpenDevice(lun, false)
	if err != nil {
		return err
	}
	err = a.format(ctx, lun, dev, exists, opts)
	return errors.Join(err, dev.Close())
}

func (a *app) format(ctx context.Context, lun string, dev *filedev.Device, exists bool, opts vmfs.FormatOptions) error {
	if exists {
		if err := refuseMounted(ctx, lun, dev); err != nil {
			return err
		}
		if err := a.confirm("destroy everything on %s (%s)", lun, bytesText(dev.Geometry().SizeBytes)); err != nil {
			return err
		}
	}
	if err := a.keepOut(ctx, lun, dev); err != nil {
		return err
	}
	rand.Read(opts.Volume[:]) // never fails (crypto/rand since Go 1.24)
	p := a.progress("writing the volume's structures", 0)
	opts.Progress = func(done, _ int64) { p.at(done) }
	if err := vmfs.Format(ctx, dev, a.clk, opts); err != nil {
		return err
	}
	p.end()
	fmt.Fprintf(a.out, "volume %x on %s\n", opts.Volume, lun)
	return nil
}

// keepOut makes sure that nobody mounts what is on the LUN, or makes another volume
// there, until dev is closed: it takes the guard of every slot. Where there are no
// guards it can only look once more.
func (a *app) keepOut(ctx context.Context, lun string, dev *filedev.Device) error {
	for slot := range vmfs.Slots {
		err := dev.Guard(ctx, slot, 0)
		if errors.Is(err, block.ErrNotSupported) {
			return refuseMounted(ctx, lun, dev)
		}
		if err != nil {
			return fmt.Errorf("%s is in use by another process of this machine: %w", lun, err)
		}
	}
	return nil
}

// refuseMounted refuses a LUN whose volume a host may still be using.
func refuseMounted(ctx context.Context, lun string, dev *filedev.Device) error {
	live, err := vmfs.InUse(ctx, dev)
	if err != nil && !errors.Is(err, vmfs.ErrFormat) {
		return err
	}
	for _, s := range live {
		r := s.Register
		gone, err := dev.Gone(ctx, s.Holder())
		if err != nil {
			return err
		}
		if !gone {
			return &vmfs.HeldError{Path: "the volume on " + lun, HostName: r.HostName, Slot: s.Slot, Generation: r.Generation,
				Cause: errors.New("stop its server first; if that host is dead, confirm it: basalt fs confirm-down " + lun + " " + r.HostName)}
		}
	}
	return nil
}

// volumeInfo is a volume as "fs info" and "fs df" show it.
type volumeInfo struct {
	Volume       string    `json:"volume"`
	Label        string    `json:"label"`
	Created      time.Time `json:"created"`
	SizeBytes    int64     `json:"size_bytes"`
	UsedBytes    int64     `json:"used_bytes"`
	FreeBytes    int64     `json:"free_bytes"`
	SystemBytes  int64     `json:"system_bytes"`
	ReserveBytes int64     `json:"reserve_bytes"`
	UnitBytes    int       `json:"unit_bytes"`
	LeaseMillis  int64     `json:"lease_ms"`
	Format       int       `json:"format_version"`
}

func (a *app) readInfo(ctx context.Context, lun string) (volumeInfo, error) {
	var out volumeInfo
	err := a.withView(ctx, lun, func(ds *datastore.Datastore) error {
		sb := ds.Volume().Superblock()
		sp, err := ds.Volume().Space(ctx)
		if err != nil {
			return err
		}
		out = volumeInfo{
			Volume: fmt.Sprintf("%x", sb.Volume), Label: sb.Label, Created: sb.Created.UTC(), SizeBytes: sb.SizeBytes,
			UsedBytes: sp.UsedBytes, FreeBytes: sp.FreeBytes, SystemBytes: sp.SystemBytes, ReserveBytes: sp.ReserveBytes,
			UnitBytes: sb.UnitBytes, LeaseMillis: sb.Lease.Milliseconds(), Format: vmfs.FormatVersion,
		}
		return nil
	})
	return out, err
}

func (a *app) fsInfo() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use: "info LUN", Short: "Describe a volume", Args: args(1, 1),
		RunE: a.onLUN(func(ctx context.Context, lun string) error {
			v, err := a.readInfo(ctx, lun)
			if err != nil {
				return err
			}
			if a.json {
				return a.emit(v)
			}
			fmt.Fprintf(a.out, "volume   %s\nlabel    %s\ncreated  %s\nsize     %s\nused     %s\nfree     %s\nunits    %d bytes\nlease    %v\nformat   %d\n",
				v.Volume, v.Label, v.Created.Format(time.RFC3339), bytesText(v.SizeBytes), bytesText(v.UsedBytes), bytesText(v.FreeBytes),
				v.UnitBytes, time.Duration(v.LeaseMillis)*time.Millisecond, v.Format)
			return nil
		}),
	})
}

func (a *app) fsDF() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use: "df LUN", Short: "Show how a volume's space is used", Args: args(1, 1),
		RunE: a.onLUN(func(ctx context.Context, lun string) error {
			v, err := a.readInfo(ctx, lun)
			if err != nil {
				return err
			}
			if a.json {
				return a.emit(v)
			}
			w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', tabwriter.AlignRight)
			fmt.Fprintln(w, "SIZE\tSYSTEM\tUSED\tRESERVE\tFREE\tUSE%\t")
			free := v.FreeBytes - v.ReserveBytes // the reserve is for metadata alone
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d%%\t\n", bytesText(v.SizeBytes), bytesText(v.SystemBytes), bytesText(v.UsedBytes),
				bytesText(v.ReserveBytes), bytesText(free), (v.UsedBytes*100+v.UsedBytes+free-1)/max(1, v.UsedBytes+free))
			return w.Flush()
		}),
	})
}

// onLUN adapts a verb whose one argument is a LUN.
func (a *app) onLUN(f func(ctx context.Context, lun string) error) func(*cobra.Command, []string) error {
	return func(c *cobra.Command, args []string) error {
		lun, err := lunAddress(args[0])
		if err != nil {
			return err
		}
		return f(c.Context(), lun)
	}
}

func (a *app) fsCheck() *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "check LUN",
		Short: "Verify a volume and all disks on it",
		Long: `Verify a volume and all disks on it; nothing is changed. On a mounted volume
each object is looked at under its lock, and what other hosts hold is left out.
Exit code 6 when there is damage; leaked space alone is told and is none.`,
		Args: args(1, 1),
		RunE: a.onLUN(a.check),
	})
}

// checkResult is the outcome of a check in JSON.
type checkResult struct {
	Findings  []checkFinding `json:"findings"`
	Objects   int            `json:"objects"`
	Skipped   int            `json:"skipped"`
	UsedBytes int64          `json:"used_bytes"`
	FreeBytes int64          `json:"free_bytes"`
	Clean     bool           `json:"clean"`
}

type checkFinding struct {
	Severity string `json:"severity"`
	Where    string `json:"where"`
	What     string `json:"what"`
}

func (a *app) check(ctx context.Context, lun string) error {
	r, err := a.runCheck(ctx, lun)
	if err != nil {
		return err
	}
	out := checkResult{
		Findings: []checkFinding{}, Objects: r.Objects, Skipped: r.Skipped,
		UsedBytes: r.UsedSlabs * vmfs.SlabBytes, FreeBytes: r.FreeSlabs * vmfs.SlabBytes, Clean: r.Worst() == vmfs.Note,
	}
	for _, f := range r.Findings {
		out.Findings = append(out.Findings, checkFinding{f.Severity.String(), f.Where, f.What})
	}
	switch {
	case a.json:
		err = a.emit(out)
	default:
		for _, f := range out.Findings {
			fmt.Fprintf(a.out, "%s: %s: %s\n", f.Severity, f.Where, f.What)
		}
		word := map[vmfs.Severity]string{vmfs.Note: "clean", vmfs.Leak: "sound, with leaked space", vmfs.Damage: "damaged"}[r.Worst()]
		fmt.Fprintf(a.out, "%s: %d objects checked, %d held elsewhere; %s used, %s free\n", word, r.Objects, r.Skipped, bytesText(out.UsedBytes), bytesText(out.FreeBytes))
	}
	if err == nil && r.Worst() == vmfs.Damage {
		err = fmt.Errorf("%s: %w", lun, errDamaged)
	}
	return err
}

// runCheck checks without a slot when nobody has the volume mounted, else as a
// host of its own, so that what it finds is confirmed under locks.
func (a *app) runCheck(ctx context.Context, lun string) (*vmfs.Report, error) {
	var report *vmfs.Report
	alone := false
	err := a.withView(ctx, lun, func(ds *datastore.Datastore) error {
		live, err := vmfs.InUse(ctx, ds.Volume().Device())
		if err != nil || len(live) > 0 {
			return err
		}
		if report, err = ds.Check(ctx); err != nil {
			return err
		}
		live, err = vmfs.InUse(ctx, ds.Volume().Device())
		alone = len(live) == 0 // whoever came meanwhile may have confused it
		return err
	})
	if err != nil || alone {
		return report, err
	}
	err = a.withMount(ctx, lun, func(ds *datastore.Datastore) error {
		report, err = ds.Check(ctx)
		return err
	})
	return report, err
}

func (a *app) fsConfirmDown() *cobra.Command {
	return a.yesFlag(&cobra.Command{
		Use:   "confirm-down LUN HOST",
		Short: "Vouch that a host is down, so that its disks can be taken over",
		Long: `Vouch that a host is powered off or cut off from the LUN, where Basalt has no
means to make sure of it. Its silence is still observed for a full lease. If the
host is alive after all and writes on, data is lost: look at the machine first.`,
		Args: args(2, 2),
		RunE: func(c *cobra.Command, args []string) error {
			lun, err := lunAddress(args[0])
			if err != nil {
				return err
			}
			return a.confirmDown(c.Context(), lun, args[1])
		},
	})
}

func (a *app) confirmDown(ctx context.Context, lun, host string) error {
	err := a.withView(ctx, lun, func(ds *datastore.Datastore) error {
		_, err := slotsOf(ctx, ds, lun, host)
		return err
	})
	if err != nil {
		return err
	}
	if err := a.confirm("take all disks of host %q away from it; it must be powered off", host); err != nil {
		return err
	}
	// On a device that only one host can use, the mount itself needs the word.
	h := a.host()
	h.Vouched = []string{host}
	ds, err := store.Mount(ctx, lun, h, a.clk, a.log)
	if err != nil {
		return err
	}
	err = a.breakVouched(ctx, ds, lun, host)
	return errors.Join(err, ds.Close(context.WithoutCancel(ctx)))
}

func (a *app) breakVouched(ctx context.Context, ds *datastore.Datastore, lun, host string) error {
	found, err := slotsOf(ctx, ds, lun, host)
	if err != nil && !errors.Is(err, vmfs.ErrNotFound) {
		return err
	}
	s := ds.Volume().Session()
	for _, h := range found {
		if h.Slot == s.Slot() {
			continue
		}
		if err := s.ConfirmDown(ctx, h.Slot, h.Register.Generation); err != nil && !errors.Is(err, lease.ErrDead) {
			return err
		}
	}
	fmt.Fprintf(a.out, "host %q is down; its disks can be opened elsewhere\n", host)
	return nil
}

// slotsOf lists the slots that a host of the name has.
func slotsOf(ctx context.Context, ds *datastore.Datastore, lun, host string) ([]lease.SlotView, error) {
	all, err := ds.Volume().Hosts(ctx)
	if err != nil {
		return nil, err
	}
	found := slices.DeleteFunc(all, func(h lease.SlotView) bool { return !inUse(h) || h.Register.HostName != host })
	if len(found) == 0 {
		return nil, fmt.Errorf("host %q has no slot on %s: %w", host, lun, vmfs.ErrNotFound)
	}
	return found, nil
}
