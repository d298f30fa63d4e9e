package vmfs

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"basalt/block"
)

// folder is a folder object with its content, under its lock or as a view.
type folder struct {
	*Object
	content *FolderContent
}

// loadFolder decodes the folder's newest header.
func loadFolder(ctx context.Context, o *Object) (*folder, error) {
	if o.kind != KindFolder {
		return nil, ErrNotFolder
	}
	h, err := o.Header(ctx)
	if err != nil {
		return nil, err
	}
	c, err := DecodeFolder(h.Payload)
	if err != nil {
		return nil, o.corrupt("%v", err)
	}
	if err := o.checkSlabs(c.slabs); err != nil {
		return nil, err
	}
	return &folder{o, c}, nil
}

// openFolder locks a folder for one operation.
func (v *Volume) openFolder(ctx context.Context, ref Ref) (*folder, error) {
	o, err := v.Open(ctx, ref, LockExclusive, operation)
	if err != nil {
		return nil, err
	}
	f, err := loadFolder(ctx, o)
	if err != nil {
		return nil, errors.Join(err, o.Close(ctx))
	}
	return f, nil
}

// all reads every entry, with one device read a slab. On a view, a block that
// changed under the walk is damage.
func (f *folder) all(ctx context.Context) ([]Entry, error) {
	out := slices.Clone(f.content.inline)
	for _, s := range f.content.slabs {
		var first, end int64
		for _, p := range f.content.blocks {
			if SlabAt(p.off) == s && (end == 0 || p.off < first) {
				first = p.off
			}
			if SlabAt(p.off) == s {
				end = max(end, p.off+folderBlock)
			}
		}
		if end == 0 {
			continue
		}
		b := block.AlignedBuffer(int(end - first))
		if err := f.v.dev.ReadAt(ctx, b, first); err != nil {
			return nil, fmt.Errorf("read folder %v: %w", f.ref, err)
		}
		for _, p := range f.content.blocks {
			if SlabAt(p.off) != s {
				continue
			}
			e, err := decodeBlock(b[p.off-first:p.off-first+folderBlock], f.v.sb.Volume, f.ref, p)
			if err != nil {
				return nil, err
			}
			out = append(out, e...)
		}
	}
	return out, nil
}

func (f *folder) readBlock(ctx context.Context, i int) ([]Entry, error) {
	p := f.content.blocks[i]
	b := block.AlignedBuffer(folderBlock)
	if err := f.v.dev.ReadAt(ctx, b, p.off); err != nil {
		return nil, fmt.Errorf("read folder %v: %w", f.ref, err)
	}
	return decodeBlock(b, f.v.sb.Volume, f.ref, p)
}

// entries lists a folder without its lock.
func (v *Volume) entries(ctx context.Context, ref Ref) ([]Entry, error) {
	o, err := v.OpenView(ctx, ref)
	if err != nil {
		return nil, err
	}
	return v.entriesOf(ctx, o)
}

// entriesOf lists a folder without its lock. What looks damaged because the folder
// was removed meanwhile, and its place used again, is not found.
func (v *Volume) entriesOf(ctx context.Context, o *Object) ([]Entry, error) {
	entries, err := v.walkEntries(ctx, o)
	if isDamage(err) {
		if live, lerr := v.IsLive(ctx, o.ref); lerr == nil && !live {
			return nil, fmt.Errorf("object %v: %w: it was removed meanwhile", o.ref, ErrNotFound)
		}
	}
	return entries, err
}

// walkEntries reads the entries again when the header changed meanwhile, and takes
// the lock when that happens too often.
func (v *Volume) walkEntries(ctx context.Context, o *Object) ([]Entry, error) {
	var last error
	for range viewReads {
		f, err := loadFolder(ctx, o)
		if err != nil {
			return nil, err
		}
		was := o.header.Sequence
		out, err := f.all(ctx)
		if err == nil {
			return out, nil
		}
		last = err
		if h, herr := o.Header(ctx); herr != nil || h.Sequence == was {
			return nil, errors.Join(err, herr)
		}
	}
	if v.session == nil {
		return nil, last
	}
	f, err := v.openFolder(ctx, o.ref)
	if err != nil {
		return nil, err
	}
	out, err := f.all(ctx)
	return out, errors.Join(err, f.Close(ctx))
}

// add puts an entry in, durably.
func (f *folder) add(ctx context.Context, e Entry) error {
	c := f.content
	if c.entries >= MaxFolderEntries {
		return fmt.Errorf("%w: it holds %d names", ErrFolderFull, c.entries)
	}
	if c.form == formInline {
		used := entryBytes(e)
		for _, have := range c.inline {
			used += entryBytes(have)
		}
		next := *c
		next.entries++
		if used <= inlineMax {
			next.inline = append(slices.Clone(c.inline), e)
			return f.store(ctx, &next)
		}
		next.form, next.inline, next.blocks = formBlocks, nil, nil
		return f.rewrite(ctx, &next, -1, append(slices.Clone(c.inline), e))
	}
	for i, p := range c.blocks {
		if p.used+entryBytes(e) <= blockMax {
			have, err := f.readBlock(ctx, i)
			if err != nil {
				return err
			}
			next := *c
			next.entries++
			return f.rewrite(ctx, &next, i, append(have, e))
		}
	}
	next := *c
	next.entries++
	return f.rewrite(ctx, &next, -1, []Entry{e})
}

// remove takes the entry of ref with the given name out, durably. It is no error
// when there is none.
func (f *folder) remove(ctx context.Context, ref Ref, name string) error {
	c := f.content
	match := func(e Entry) bool { return e.Ref == ref && e.Name == name }
	next := *c
	if i := slices.IndexFunc(c.inline, match); i >= 0 {
		next.inline = slices.Delete(slices.Clone(c.inline), i, i+1)
		next.entries--
		return f.store(ctx, &next)
	}
	for i := range c.blocks {
		have, err := f.readBlock(ctx, i)
		if err != nil {
			return err
		}
		if j := slices.IndexFunc(have, match); j >= 0 {
			next.entries--
			return f.rewrite(ctx, &next, i, slices.Delete(have, j, j+1))
		}
	}
	return nil
}

// rewrite replaces block i (-1: none) by blocks that hold the given entries, and
// stores the content.
func (f *folder) rewrite(ctx context.Context, next *FolderContent, i int, entries []Entry) error {
	next.blocks = slices.Clone(next.blocks)
	if i >= 0 {
		next.blocks = slices.Delete(next.blocks, i, i+1)
	}
	var parts [][]Entry
	for used := blockMax + 1; len(entries) > 0; entries = entries[1:] {
		if used+entryBytes(entries[0]) > blockMax {
			parts, used = append(parts, nil), 0
		}
		parts[len(parts)-1] = append(parts[len(parts)-1], entries[0])
		used += entryBytes(entries[0])
	}
	if len(next.blocks)+len(parts) > folderBlocks {
		return fmt.Errorf("%w: its names fill %d blocks", ErrFolderFull, folderBlocks)
	}
	free, err := f.freeBlocks(ctx, next, len(parts))
	if err != nil {
		return err
	}
	for k, part := range parts {
		b := block.AlignedBuffer(folderBlock)
		p := encodeBlock(b, f.v.sb.Volume, f.ref, free[k], part)
		if err := f.v.dev.WriteAt(context.WithoutCancel(ctx), b, p.off); err != nil {
			return fmt.Errorf("write folder %v: %w", f.ref, err)
		}
		next.blocks = append(next.blocks, p)
	}
	if len(parts) > 0 {
		if err := f.v.dev.Flush(ctx); err != nil {
			return fmt.Errorf("write folder %v: %w", f.ref, err)
		}
	}
	return f.store(ctx, next)
}

// freeBlocks gives the addresses of n blocks in the folder's slabs that neither
// header copy refers to, so that a header write that was acknowledged and lost
// leaves the older content whole. It claims slabs into next as needed.
func (f *folder) freeBlocks(ctx context.Context, next *FolderContent, n int) ([]int64, error) {
	newest, other, _, err := f.readHeaders(ctx)
	if err != nil {
		return nil, err
	}
	used := map[int64]bool{}
	// What this handle has written counts too: the media may lack it.
	for _, c := range []*FolderContent{f.content, next} {
		for _, p := range c.blocks {
			used[p.off] = true
		}
	}
	for _, h := range []*Header{newest, other} {
		if h == nil {
			continue
		}
		// A payload that does not decode refers to nothing that could be kept.
		if c, err := DecodeFolder(h.Payload); err == nil {
			for _, p := range c.blocks {
				used[p.off] = true
			}
		}
	}
	var free []int64
	for {
		for _, s := range next.slabs {
			for off := SlabOff(s); off < SlabOff(s+1) && len(free) < n; off += folderBlock {
				if !used[off] {
					free = append(free, off)
					used[off] = true
				}
			}
		}
		if len(free) == n {
			return free, nil
		}
		if len(next.slabs) == folderSlabs {
			return nil, fmt.Errorf("%w: its names fill %d slabs", ErrFolderFull, folderSlabs)
		}
		got, err := f.grow(ctx, 1, true)
		if err != nil {
			return nil, err
		}
		if len(got) == 0 {
			return nil, ErrNoSpace // others were faster
		}
		next.slabs = append(slices.Clone(next.slabs), got...)
	}
}

// store puts the content into the header, with no intents.
func (f *folder) store(ctx context.Context, next *FolderContent) error {
	err := f.editTwice(ctx, func(h *Header) { h.Payload, h.Intents = next.Encode(), nil })
	if err == nil {
		f.content = next
	}
	return err
}

// grow claims up to n slabs for a file or folder: the intent goes into the header
// first (R2), and stays there until the caller has stored a payload that names
// them.
func (o *Object) grow(ctx context.Context, n int, metadata bool) ([]int64, error) {
	p, err := o.v.PlanClaim(ctx, n, metadata)
	if err != nil {
		return nil, err
	}
	if err := o.edit(ctx, func(h *Header) {
		h.Intents = append(slices.Clone(h.Intents), p.Units...)
		slices.Sort(h.Intents)
		h.Intents = slices.Compact(h.Intents)
	}); err != nil {
		return nil, err
	}
	return o.Claim(ctx, p, metadata)
}

// settleIntents finishes, at an opening under the exclusive lock, the claims of a
// file or folder that a crash left open: slabs that no header names go back.
func (o *Object) settleIntents(ctx context.Context) error {
	if o.LockGeneration() == 0 || (o.kind != KindFile && o.kind != KindFolder) {
		return nil
	}
	h, err := o.Header(ctx)
	if err != nil || len(h.Intents) == 0 {
		return err
	}
	tagged, err := o.Settle(ctx, h.Intents)
	if err != nil {
		return err
	}
	named, err := o.namedSlabs(h)
	if err != nil {
		return err
	}
	leaked := slices.DeleteFunc(tagged, func(s int64) bool { return slices.Contains(named, s) })
	if err := o.v.unmap(ctx, leaked); err != nil {
		return err
	}
	if err := o.Release(ctx, leaked); err != nil {
		return err
	}
	return o.edit(ctx, func(h *Header) { h.Intents = nil })
}

// namedSlabs lists the slabs that a file's or folder's header names.
func (o *Object) namedSlabs(h *Header) ([]int64, error) {
	switch o.kind {
	case KindFolder:
		c, err := DecodeFolder(h.Payload)
		if err != nil {
			return nil, o.corrupt("%v", err)
		}
		return c.slabs, nil
	case KindFile:
		c, err := o.fileContent(h)
		if err != nil {
			return nil, err
		}
		return c.slabs(), nil
	}
	return nil, nil
}

func (o *Object) corrupt(format string, args ...any) error {
	return &block.CorruptError{Object: fmt.Sprintf("%v %v", o.kind, o.ref), OffBytes: objectOff(o.ref.Slot), Reason: fmt.Sprintf(format, args...)}
}

// checkSlabs refuses slab numbers that the volume does not have.
func (o *Object) checkSlabs(slabs []int64) error {
	for _, s := range slabs {
		if s < 0 || s >= o.v.geo.slabs() {
			return o.corrupt("names slab %d of %d", s, o.v.geo.slabs())
		}
	}
	return nil
}
