package vmfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"basalt/block"
)

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
		var err error
		if id.State == StateDying {
			err = c.dying(ctx, ref, where)
		} else {
			err = c.object(ctx, ref, where)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// dying notes an object between two states. It counts on its origin until it is
// FREE. It may have come to life or ended since it was scanned, even while its
// header is read.
func (c *checker) dying(ctx context.Context, ref Ref, where string) error {
	o := &Object{v: c.v, ref: ref, kind: c.ids[ref.Slot].Kind}
	h, herr := o.Header(ctx)
	_, now, err := c.v.readIdentity(ctx, ref.Slot)
	switch {
	case err != nil:
		return c.note(where, err)
	case now.State == StateFree || now.Incarnation != ref.Incarnation:
		delete(c.ids, ref.Slot)
		return nil
	case now.State == StateLive:
		c.ids[ref.Slot] = *now
		return c.object(ctx, ref, where)
	}
	c.report.add(Note, where, "its creation or removal is not finished; a later change of its folder removes it")
	if herr != nil {
		return c.note(where, herr)
	}
	if h.Origin != (Ref{}) {
		c.on[h.Origin] = append(c.on[h.Origin], ref)
	}
	return nil
}

// object opens one LIVE object, under its lock when mounted, and checks it.
func (c *checker) object(ctx context.Context, ref Ref, where string) error {
	o, err := c.open(ctx, ref)
	switch {
	case errors.Is(err, ErrHeld):
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
		c.on[h.Origin] = append(c.on[h.Origin], o.ref)
	}
	if err := c.headerCopies(ctx, o, where); err != nil {
		return err
	}
	var own DiskReport
	switch o.kind {
	case KindDisk, KindSnapshot:
		if own, err = c.disks(ctx, o); err != nil {
			return err
		}
		for _, f := range own.Findings {
			c.report.Findings = append(c.report.Findings, Finding{f.Severity, where + " " + f.Where, f.What})
		}
	default:
		if own.Slabs, err = o.namedSlabs(h); err != nil {
			return err
		}
		own.Claiming = h.Intents
	}
	id := c.ids[o.ref.Slot]
	if shown, err := c.shown(ctx, o); err != nil {
		return err
	} else if !shown {
		c.report.add(Leak, where, "is in no folder (its name is %q in object %v)", id.Name, id.Parent)
	}
	return c.ownership(ctx, o, own, where)
}

// headerCopies notes a copy of an object's header that does not read while the other
// one serves. A write that a power cut tore leaves it so, and so does damage to the
// newest header: then the object has gone back to an earlier state.
func (c *checker) headerCopies(ctx context.Context, o *Object, where string) error {
	b := block.AlignedBuffer(HeaderBytes)
	for _, in := range []int64{headerAOff, headerBOff} {
		off := objectOff(o.ref.Slot) + in
		if err := c.v.dev.ReadAt(ctx, b, off); err != nil {
			return fmt.Errorf("read header of object %v: %w", o.ref, err)
		}
		if _, err := DecodeHeader(b, c.v.sb.Volume, off); err != nil && len(bytes.TrimLeft(b, "\x00")) > 0 {
			c.report.add(Note, where, "%v; the other copy serves: a write was cut short, or the newest state is lost", err)
		}
	}
	return nil
}

// shown reports whether a folder shows the object. It looks again where the object
// says that it is now: it may have moved while the folders were read.
func (c *checker) shown(ctx context.Context, o *Object) (bool, error) {
	if o.kind == KindSnapshot || c.named[o.ref] {
		return true, nil
	}
	_, id, err := c.v.readIdentity(ctx, o.ref.Slot)
	if err != nil {
		return false, err
	}
	entries, err := c.v.entries(ctx, id.Parent)
	if errors.Is(err, ErrNotFound) || errors.Is(err, ErrNotFolder) || isDamage(err) {
		return false, nil
	}
	return slices.ContainsFunc(entries, func(e Entry) bool { return e.Ref == o.ref && e.Name == id.Name }), err
}

// ownership compares the slabs that an object names with the owner table.
func (c *checker) ownership(ctx context.Context, o *Object, own DiskReport, where string) error {
	mine := map[int64]bool{}
	for _, s := range own.Slabs {
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
		if u, _ := c.v.geo.unitOfSlab(s); slices.Contains(own.Claiming, u) || slices.Contains(own.Releasing, s) {
			c.report.add(Note, where, "slab %d is of a claim or release that was not finished; the next opening finishes it", s)
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
		_, id, err := c.v.readIdentity(ctx, ref.Slot)
		if err != nil {
			if err := c.note(fmt.Sprintf("slab %d", s), err); err != nil {
				return err
			}
			continue // whose it is cannot be told
		}
		if now == tag && (id.State == StateFree || id.Incarnation != ref.Incarnation) {
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
		if id.State != StateLive || id.Pending.Delta != 0 || int(id.Count) == len(c.on[ref]) {
			continue
		}
		n, err := c.dependants(ctx, ref)
		if err != nil {
			return err
		}
		_, now, err := c.v.readIdentity(ctx, slot)
		if err != nil {
			return err
		}
		if now.Incarnation != id.Incarnation || now.Count != id.Count || now.Pending.Delta != 0 || int(now.Count) == n {
			continue // it is being changed, or was
		}
		s := Damage
		if int(now.Count) > n {
			s = Leak
		}
		c.report.add(s, c.where(ref, id.Kind), "counts %d objects that depend on it, there are %d", now.Count, n)
	}
	return nil
}

// dependants asks those that were found to depend on origin whether they still do.
func (c *checker) dependants(ctx context.Context, origin Ref) (int, error) {
	n := 0
	for _, ref := range c.on[origin] {
		_, id, err := c.v.readIdentity(ctx, ref.Slot)
		if err != nil && !isDamage(err) {
			return 0, err
		}
		if err != nil || id.State != StateFree && id.Incarnation == ref.Incarnation {
			n++
		}
	}
	return n, nil
}
