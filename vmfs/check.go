package vmfs

import (
	"context"
	"errors"
	"fmt"

	"basalt/block"
	"basalt/lease"
)

// Severity is what a finding means for the user.
type Severity int

// The severities.
const (
	Note   Severity = iota // something that the next change tidies up, or that was not looked at
	Leak                   // space or a slot that nobody uses; nothing is lost
	Damage                 // content that cannot be trusted
)

func (s Severity) String() string { return [...]string{"note", "leak", "damage"}[s] }

// Finding is one thing that check has to say.
type Finding struct {
	Severity Severity
	Where    string // "disk 12.1 /vm1/d0", "owner table unit 7"
	What     string
}

// Report is the outcome of a check.
type Report struct {
	Findings  []Finding
	Objects   int   // LIVE ones looked at
	Skipped   int   // held by another live host
	UsedSlabs int64 // of objects
	FreeSlabs int64
}

// Worst is the gravest severity found.
func (r *Report) Worst() Severity {
	worst := Note
	for _, f := range r.Findings {
		worst = max(worst, f.Severity)
	}
	return worst
}

func (r *Report) add(s Severity, where, format string, args ...any) {
	r.Findings = append(r.Findings, Finding{s, where, fmt.Sprintf(format, args...)})
}

// DiskReport is what the disk engine knows of one disk or published snapshot.
type DiskReport struct {
	Slabs     []int64  // numbers of the slabs that it believes it owns
	Claiming  []uint32 // owner-table units of a claim that a crash left open: more slabs there may be its own
	Releasing []int64  // slabs that it was giving back, and may still own
	Findings  []Finding
}

// DiskChecker checks the inside of a disk.
type DiskChecker func(ctx context.Context, o *Object) (DiskReport, error)

// checker is the state of one check.
type checker struct {
	v      *Volume
	disks  DiskChecker
	report Report
	tags   []uint32            // of every slab
	owned  map[uint32][]int64  // slabs by tag, as scanned
	ids    map[uint32]Identity // of every slot that is not FREE
	named  map[Ref]bool        // objects that a folder shows
	on     map[Ref][]Ref       // objects that name this origin
	paths  map[Ref]string
}

// Check verifies the whole volume. On a mount it looks at each object under that
// object's lock and skips those that others hold; on a view it trusts that nobody
// has the volume mounted. It repairs nothing. Its error is one that prevented the
// check.
func (v *Volume) Check(ctx context.Context, disks DiskChecker) (*Report, error) {
	c := checker{
		v: v, disks: disks, ids: map[uint32]Identity{}, named: map[Ref]bool{rootRef: true},
		owned: map[uint32][]int64{}, on: map[Ref][]Ref{}, paths: map[Ref]string{rootRef: "/"},
	}
	for _, step := range []func(context.Context) error{
		c.superblocks, c.slots, c.ownerTable, c.objectTable, c.folders, c.objects, c.leaks, c.references,
	} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	return &c.report, nil
}

// note turns damage into a finding; other errors end the check.
func (c *checker) note(where string, err error) error {
	if damaged, ok := errors.AsType[*block.CorruptError](err); ok {
		c.report.add(Damage, where, "%v", damaged)
		return nil
	}
	return err
}

func (c *checker) superblocks(ctx context.Context) error {
	for i, off := range c.v.sb.copies() {
		where := fmt.Sprintf("superblock copy %d at byte %d", i+1, off)
		s, err := readCopy(ctx, c.v.dev, off)
		switch {
		case errors.Is(err, ErrNotVolume):
			c.report.add(Damage, where, "is not a superblock; the other copies serve")
		case err != nil:
			if err := c.note(where, err); err != nil {
				return err
			}
		case s.Volume != c.v.sb.Volume || s.Sequence != c.v.sb.Sequence:
			c.report.add(Damage, where, "is of volume %x, sequence %d, not %x, %d", s.Volume, s.Sequence, c.v.sb.Volume, c.v.sb.Sequence)
		}
	}
	return nil
}

func (c *checker) slots(ctx context.Context) error {
	views, err := lease.Observe(ctx, c.v.dev, areaOf(&c.v.sb))
	if err != nil {
		return err
	}
	for _, s := range views {
		if s.Err != nil {
			c.report.add(Damage, fmt.Sprintf("slot %d", s.Slot), "%v", s.Err)
		}
	}
	return nil
}

func (c *checker) ownerTable(ctx context.Context) error {
	v := c.v
	c.tags = make([]uint32, v.geo.slabs())
	for u := range v.geo.tableUnits() {
		img, _, err := v.ownerPlace(u).Read(ctx, v.dev)
		if err != nil {
			if err := c.note(fmt.Sprintf("owner table unit %d", u), err); err != nil {
				return err
			}
			continue
		}
		first, end := v.geo.unitSlabs(u)
		for s := first; s < end; s++ {
			tag := tagAt(img, int(s-first))
			c.tags[s] = tag
			switch tag {
			case 0:
				c.report.FreeSlabs++
			case systemTag:
			default:
				c.report.UsedSlabs++
				c.owned[tag] = append(c.owned[tag], s)
			}
			c.systemSlab(s, tag)
		}
	}
	return nil
}

// systemSlab checks that exactly the volume's own slabs are tagged as its own.
func (c *checker) systemSlab(s int64, tag uint32) {
	in, g := s%SlabsPerGroup, s/SlabsPerGroup
	system := in == 0 || (c.v.geo.hasTable(g) && in <= TableSlabs)
	switch {
	case system && tag != systemTag:
		c.report.add(Damage, fmt.Sprintf("slab %d", s), "holds the volume's structures and is tagged as object %v's", refOfTag(tag))
	case !system && tag == systemTag:
		c.report.add(Damage, fmt.Sprintf("slab %d", s), "is tagged as the volume's and is not")
	}
}

func (c *checker) objectTable(ctx context.Context) error {
	groups, err := c.v.tableGroups(ctx)
	if err != nil {
		return c.note("volume unit", err)
	}
	for slot := range groups * ObjectsPerGroup {
		where := fmt.Sprintf("object slot %d", slot)
		if _, err := c.v.readLock(ctx, slot); err != nil {
			if err := c.note(where, err); err != nil {
				return err
			}
		}
		_, id, err := c.v.readIdentity(ctx, slot)
		if err != nil {
			if err := c.note(where, err); err != nil {
				return err
			}
			continue
		}
		if id.State != StateFree {
			c.ids[slot] = *id
		}
	}
	return nil
}

// folders walks the names from the root.
func (c *checker) folders(ctx context.Context) error {
	return c.folder(ctx, rootRef, 0)
}

func (c *checker) folder(ctx context.Context, ref Ref, depth int) error {
	where := "folder " + c.paths[ref]
	if depth > maxDepth {
		c.report.add(Damage, where, "is nested more than %d deep", maxDepth)
		return nil
	}
	entries, err := c.v.entries(ctx, ref)
	if err != nil {
		if errors.Is(err, ErrNotFound) {
			return nil // removed meanwhile
		}
		return c.note(where, err)
	}
	for _, e := range entries {
		info, agrees, err := c.v.confirm(ctx, ref, e)
		if err != nil {
			if err := c.note(where, err); err != nil {
				return err
			}
			continue
		}
		if !agrees {
			c.report.add(Note, where, "entry %q is stale", e.Name)
			continue
		}
		path := c.paths[ref] + e.Name
		if c.named[e.Ref] {
			if was := c.paths[e.Ref]; was == path || was == path+"/" {
				c.report.add(Damage, where, "entry %q names an object that has an entry already", e.Name)
			}
			continue // else it was moved while the folders were read
		}
		c.named[e.Ref], c.paths[e.Ref] = true, path
		c.ids[e.Ref.Slot] = info.Identity
		if info.Kind == KindFolder {
			c.paths[e.Ref] += "/"
			if err := c.folder(ctx, e.Ref, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}
