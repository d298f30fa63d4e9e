package vmfs

import (
	"context"
	"errors"
	"fmt"
	"slices"

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
	Objects   int // LIVE ones looked at
	Skipped   int // held by another live host
	UsedSlabs int64
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
	Slabs    []int64 // numbers of the slabs that it believes it owns
	Findings []Finding
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
	counts map[Ref]uint32      // objects that name this origin
	paths  map[Ref]string
	held   map[Ref]bool // skipped
}

// Check verifies the whole volume. On a mount it looks at each object under that
// object's lock and skips those that others hold; on a view it trusts that nobody
// has the volume mounted. It repairs nothing. Its error is one that prevented the
// check.
func (v *Volume) Check(ctx context.Context, disks DiskChecker) (*Report, error) {
	c := checker{
		v: v, disks: disks, ids: map[uint32]Identity{}, named: map[Ref]bool{rootRef: true},
		owned: map[uint32][]int64{}, counts: map[Ref]uint32{}, paths: map[Ref]string{rootRef: "/"}, held: map[Ref]bool{},
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
			if tag == 0 {
				c.report.FreeSlabs++
			} else {
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
		if c.named[e.Ref] {
			c.report.add(Damage, where, "entry %q names an object that has an entry already", e.Name)
			continue
		}
		c.named[e.Ref], c.paths[e.Ref] = true, c.paths[ref]+e.Name
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

func (c *checker) where(ref Ref, k Kind) string {
	if p := c.paths[ref]; p != "" {
		return fmt.Sprintf("%v %s", k, p)
	}
	return fmt.Sprintf("%v %v", k, ref)
}

// sorted gives the slots that are not FREE, ascending.
func (c *checker) sorted() []uint32 {
	var slots []uint32
	for s := range c.ids {
		slots = append(slots, s)
	}
	slices.Sort(slots)
	return slots
}

func (c *checker) objects(ctx context.Context) error {
	for _, slot := range c.sorted() {
		id := c.ids[slot]
		ref := Ref{slot, id.Incarnation}
		if id.Kind == KindVolume {
			continue
		}
		where := c.where(ref, id.Kind)
		if id.State == StateDying {
			c.report.add(Note, where, "its removal is not finished; the next change of its folder finishes it")
			continue
		}
		if err := c.object(ctx, ref, where); err != nil {
			return err
		}
	}
	return nil
}

// object opens one LIVE object, under its lock when mounted, and checks it.
func (c *checker) object(ctx context.Context, ref Ref, where string) error {
	o, err := c.open(ctx, ref)
	switch {
	case errors.Is(err, ErrHeld):
		c.held[ref] = true
		c.report.Skipped++
		c.report.add(Note, where, "not checked: %v", err)
		return nil
	case errors.Is(err, ErrNotFound):
		delete(c.ids, ref.Slot)
		return nil
	case err != nil:
		return c.note(where, err)
	}
	c.report.Objects++
	err = c.opened(ctx, o, where)
	return errors.Join(c.note(where, err), o.Close(ctx))
}

func (c *checker) open(ctx context.Context, ref Ref) (*Object, error) {
	if c.v.session == nil {
		return c.v.OpenView(ctx, ref)
	}
	return c.v.open(ctx, ref, LockExclusive, NoWait)
}

func (c *checker) opened(ctx context.Context, o *Object, where string) error {
	h, err := o.Header(ctx)
	if err != nil {
		return err
	}
	if h.Origin != (Ref{}) {
		c.counts[h.Origin]++
	}
	var slabs []int64
	switch o.kind {
	case KindDisk, KindSnapshot:
		r, err := c.disks(ctx, o)
		if err != nil {
			return err
		}
		slabs = r.Slabs
		for _, f := range r.Findings {
			c.report.Findings = append(c.report.Findings, Finding{f.Severity, where + " " + f.Where, f.What})
		}
	default:
		if slabs, err = namedSlabs(h); err != nil {
			return err
		}
	}
	id := c.ids[o.ref.Slot]
	if o.kind != KindSnapshot && !c.named[o.ref] {
		c.report.add(Leak, where, "is in no folder (its name is %q in object %v)", id.Name, id.Parent)
	}
	return c.ownership(ctx, o, slabs, where, h)
}

// ownership compares the slabs that an object names with the owner table.
func (c *checker) ownership(ctx context.Context, o *Object, slabs []int64, where string, h *Header) error {
	mine := map[int64]bool{}
	for _, s := range slabs {
		if s < 0 || s >= c.v.geo.slabs() {
			c.report.add(Damage, where, "names slab %d of %d", s, c.v.geo.slabs())
			continue
		}
		if mine[s] {
			c.report.add(Damage, where, "names slab %d twice", s)
		}
		mine[s] = true
		tag, err := c.freshTag(ctx, s, o.ref.tag())
		if err != nil {
			return err
		}
		if tag != o.ref.tag() {
			c.report.add(Damage, where, "names slab %d, which belongs to %s", s, c.ownerName(tag))
		}
	}
	for _, s := range c.owned[o.ref.tag()] {
		if mine[s] {
			continue
		}
		if tag, err := c.freshTag(ctx, s, 0); err != nil || tag != o.ref.tag() {
			if err != nil {
				return err
			}
			continue // released since the scan
		}
		if u, _ := c.v.geo.unitOfSlab(s); slices.Contains(h.Intents, u) {
			c.report.add(Note, where, "slab %d is of a claim that was not finished; the next opening returns it", s)
			continue
		}
		c.report.add(Leak, where, "owns slab %d and does not use it", s)
	}
	return nil
}

// freshTag reads a tag again when the scan's differs from what is expected: the
// object's lock has been taken since.
func (c *checker) freshTag(ctx context.Context, s int64, want uint32) (uint32, error) {
	if c.tags[s] == want {
		return want, nil
	}
	u, i := c.v.geo.unitOfSlab(s)
	img, _, err := c.v.ownerPlace(u).Read(ctx, c.v.dev)
	if err != nil {
		return 0, err
	}
	c.tags[s] = tagAt(img, i)
	return c.tags[s], nil
}

func (c *checker) ownerName(tag uint32) string {
	if tag == 0 {
		return "nobody"
	}
	ref := refOfTag(tag)
	if id, ok := c.ids[ref.Slot]; ok && id.Incarnation == ref.Incarnation {
		return c.where(ref, id.Kind)
	}
	return fmt.Sprintf("object %v, which does not exist", ref)
}

// leaks looks for slabs of objects that are gone, and confirms each by reading
// the tag and the identity again.
func (c *checker) leaks(ctx context.Context) error {
	for s, tag := range c.tags {
		if tag == 0 || tag == systemTag {
			continue
		}
		ref := refOfTag(tag)
		if id, ok := c.ids[ref.Slot]; ok && id.Incarnation == ref.Incarnation {
			continue
		}
		now, err := c.freshTag(ctx, int64(s), 0)
		if err != nil {
			return err
		}
		live, err := c.v.IsLive(ctx, ref)
		if err != nil {
			if err := c.note(fmt.Sprintf("slab %d", s), err); err != nil {
				return err
			}
		}
		if now == tag && !live {
			c.report.add(Leak, fmt.Sprintf("slab %d", s), "belongs to object %v, which does not exist", ref)
		}
	}
	return nil
}

// references compares the counts with who really depends on whom. It cannot when
// objects were skipped, as those may be the ones that depend.
func (c *checker) references(ctx context.Context) error {
	if c.report.Skipped > 0 {
		return nil
	}
	for _, slot := range c.sorted() {
		id := c.ids[slot]
		ref := Ref{slot, id.Incarnation}
		if id.State != StateLive || id.Pending.Delta != 0 || id.Count == c.counts[ref] {
			continue
		}
		_, now, err := c.v.readIdentity(ctx, slot)
		if err != nil || now.Count == c.counts[ref] || now.Incarnation != id.Incarnation {
			continue
		}
		s := Damage
		if now.Count > c.counts[ref] {
			s = Leak
		}
		c.report.add(s, c.where(ref, id.Kind), "counts %d objects that depend on it, there are %d", now.Count, c.counts[ref])
	}
	return nil
}
