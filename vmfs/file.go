package vmfs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"basalt/block"
)

// A file's payload is its content, when it is short, else where it lies.
//
//	off  size  field
//	  0     1  Form     1: content inline, 2: in slabs
//	  1     3  reserved
//	  4     4  form 1: bytes of content; form 2: number of runs
//	  8   ...  form 1: content; form 2: runs, each first slab u32, slabs u32
//
// The length is the header's SizeBytes; the last slab's rest is zero.
const (
	fileInline    = 1
	fileSlabs     = 2
	fileHead      = 8
	fileRuns      = (MaxPayload - fileHead) / 8
	fileInlineMax = MaxPayload - fileHead
)

type slabRun struct{ first, count int64 }

// FileContent is a decoded file payload.
type FileContent struct {
	form   byte
	inline []byte
	runs   []slabRun
}

// Encode returns the payload.
func (c *FileContent) Encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, fileHead, MaxPayload)
	b[0] = c.form
	if c.form == fileInline {
		le.PutUint32(b[4:], uint32(len(c.inline)))
		return append(b, c.inline...)
	}
	le.PutUint32(b[4:], uint32(len(c.runs)))
	for _, r := range c.runs {
		b = le.AppendUint32(b, uint32(r.first))
		b = le.AppendUint32(b, uint32(r.count))
	}
	return b
}

// DecodeFile reads a file's payload.
func DecodeFile(b []byte) (*FileContent, error) {
	if len(b) < fileHead {
		return nil, fmt.Errorf("file content of %d bytes", len(b))
	}
	le := binary.LittleEndian
	c, n, rest := &FileContent{form: b[0]}, int64(le.Uint32(b[4:])), b[fileHead:]
	if !isZero(b[1:4]) {
		return nil, errors.New("reserved bytes are not zero")
	}
	switch c.form {
	case fileInline:
		if n != int64(len(rest)) {
			return nil, fmt.Errorf("%d bytes of content in %d", n, len(rest))
		}
		c.inline = rest
	case fileSlabs:
		if n > fileRuns || n*8 != int64(len(rest)) {
			return nil, fmt.Errorf("%d runs in %d bytes", n, len(rest))
		}
		var total int64
		for i := range n {
			r := slabRun{int64(le.Uint32(rest[8*i:])), int64(le.Uint32(rest[8*i+4:]))}
			total += r.count
			if r.count == 0 || r.first+r.count > MaxVolumeBytes/SlabBytes || total > MaxVolumeBytes/SlabBytes {
				return nil, fmt.Errorf("run %d: %d slabs from %d", i, r.count, r.first)
			}
			c.runs = append(c.runs, r)
		}
	default:
		return nil, fmt.Errorf("file content of form %d", c.form)
	}
	return c, nil
}

// fileContent decodes a file's header and checks it against the volume.
func (o *Object) fileContent(h *Header) (*FileContent, error) {
	c, err := DecodeFile(h.Payload)
	if err != nil {
		return nil, o.corrupt("%v", err)
	}
	var slabs int64
	for _, r := range c.runs {
		slabs += r.count
		if r.first+r.count > o.v.geo.slabs() {
			return nil, o.corrupt("names slab %d of %d", r.first+r.count-1, o.v.geo.slabs())
		}
	}
	if c.form == fileInline && h.SizeBytes != int64(len(c.inline)) || c.form == fileSlabs && h.SizeBytes > slabs*SlabBytes {
		return nil, o.corrupt("%d bytes are more than its content", h.SizeBytes)
	}
	return c, nil
}

func (c *FileContent) slabs() []int64 {
	var out []int64
	for _, r := range c.runs {
		for s := r.first; s < r.first+r.count; s++ {
			out = append(out, s)
		}
	}
	return out
}

// append adds a slab at the end.
func (c *FileContent) append(slab int64) error {
	if n := len(c.runs); n > 0 && c.runs[n-1].first+c.runs[n-1].count == slab {
		c.runs[n-1].count++
		return nil
	}
	if len(c.runs) == fileRuns {
		return fmt.Errorf("%w: the free space is too scattered for this file", ErrNoSpace)
	}
	c.runs = append(c.runs, slabRun{slab, 1})
	return nil
}

// putSlabs is how many slabs a growing file claims at once.
const putSlabs = 16

// Put creates a file with the content of r, whole or not at all: nobody sees it
// before it is complete. progress, if set, is called with the bytes written so far.
// The folder is not locked while the content is copied; when another object takes
// the name meanwhile, Put returns ErrExists.
func (v *Volume) Put(ctx context.Context, path string, r io.Reader, progress func(int64)) error {
	if v.session == nil {
		return ErrReadOnly
	}
	parent, name, err := v.parentOf(ctx, path)
	if err != nil {
		return err
	}
	o, err := v.begin(ctx, parent, name)
	if err != nil {
		return err
	}
	end := v.complete
	if err = o.fill(ctx, r, progress); err != nil {
		end = v.undo
	}
	return errors.Join(err, v.endPut(context.WithoutCancel(ctx), o, parent, name, end), o.Close(ctx))
}

// begin makes an empty file that nobody sees yet.
func (v *Volume) begin(ctx context.Context, parent Ref, name string) (*Object, error) {
	empty := FileContent{form: fileInline}
	return v.inFolder(ctx, parent, func(f *folder) (*Object, error) {
		return v.beginIn(ctx, f, name, New{Kind: KindFile, Payload: empty.Encode()})
	})
}

// endPut locks the folder again for the end of a Put.
func (v *Volume) endPut(ctx context.Context, o *Object, parent Ref, name string, end func(context.Context, *Object, *folder, string) error) error {
	f, err := v.openFolder(ctx, parent)
	if err != nil {
		return errors.Join(err, v.bury(ctx, o))
	}
	return errors.Join(end(ctx, o, f, name), f.Close(ctx))
}

// complete makes a file that has its content LIVE, unless its name was taken.
func (v *Volume) complete(ctx context.Context, o *Object, f *folder, name string) error {
	_, err := v.vacant(ctx, f, name)
	if err == nil {
		err = v.enliven(ctx, o)
	}
	if err != nil {
		err = errors.Join(err, v.undo(ctx, o, f, name))
	}
	return err
}

func (o *Object) fill(ctx context.Context, r io.Reader, progress func(int64)) error {
	buf := block.AlignedBuffer(SlabBytes)
	c := FileContent{form: fileSlabs}
	var size int64
	var ready []int64 // claimed, not yet written
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(r, buf)
		if err != nil && err != io.ErrUnexpectedEOF && err != io.EOF {
			return fmt.Errorf("read the content: %w", err)
		}
		last := err != nil
		if last && size == 0 && n <= fileInlineMax {
			c = FileContent{form: fileInline, inline: append([]byte(nil), buf[:n]...)}
			size = int64(n)
			break
		}
		if n > 0 {
			clear(buf[n:])
			if len(ready) == 0 {
				if ready, err = o.growFile(ctx, &c); err != nil {
					return err
				}
			}
			// Not with ctx: no write may be on its way when the slab is given back.
			if err := o.v.dev.WriteAt(context.WithoutCancel(ctx), buf, SlabOff(ready[0])); err != nil {
				return fmt.Errorf("write the content: %w", err)
			}
			ready = ready[1:]
			size += int64(n)
			if progress != nil {
				progress(size)
			}
		}
		if last {
			break
		}
	}
	if err := o.trim(ctx, &c, ready); err != nil {
		return err
	}
	// enliven flushes the content.
	return o.editTwice(ctx, func(h *Header) { h.SizeBytes, h.Payload, h.Intents = size, c.Encode(), nil })
}

// growFile claims slabs and names them in the header, so that its intents stay few.
func (o *Object) growFile(ctx context.Context, c *FileContent) ([]int64, error) {
	got, err := o.grow(ctx, putSlabs, false)
	if err != nil {
		return nil, err
	}
	if len(got) == 0 {
		return nil, ErrNoSpace
	}
	for _, s := range got {
		if err := c.append(s); err != nil {
			return nil, err
		}
	}
	return got, o.edit(ctx, func(h *Header) { h.Payload, h.Intents = c.Encode(), nil })
}

// trim takes the slabs that were not needed off the end of the content; the next
// header has them as an intent, so that a crash does not leak them.
func (o *Object) trim(ctx context.Context, c *FileContent, spare []int64) error {
	if len(spare) == 0 {
		return nil
	}
	keep := c.slabs()
	keep = keep[:len(keep)-len(spare)]
	c.runs = nil
	for _, s := range keep {
		if err := c.append(s); err != nil {
			return err
		}
	}
	if err := o.edit(ctx, func(h *Header) {
		h.Payload, h.Intents = c.Encode(), nil
		for _, s := range spare {
			u, _ := o.v.geo.unitOfSlab(s)
			if n := len(h.Intents); n == 0 || h.Intents[n-1] != u {
				h.Intents = append(h.Intents, u)
			}
		}
	}); err != nil {
		return err
	}
	return o.Release(ctx, spare)
}

// Get copies a file's content to w, under the shared lock.
func (v *Volume) Get(ctx context.Context, path string, w io.Writer, progress func(int64)) error {
	info, err := v.Lookup(ctx, path)
	if err != nil {
		return err
	}
	switch info.Kind {
	case KindFile:
	case KindFolder:
		return fmt.Errorf("%s: %w", path, ErrIsFolder)
	default:
		return fmt.Errorf("%s: %w: it is a %v", path, ErrKind, info.Kind)
	}
	o, err := v.Open(ctx, info.Ref, LockShared, operation)
	if err != nil {
		return err
	}
	return errors.Join(o.copyTo(ctx, w, progress), o.Close(ctx))
}

func (o *Object) copyTo(ctx context.Context, w io.Writer, progress func(int64)) error {
	h, err := o.Header(ctx)
	if err != nil {
		return err
	}
	c, err := o.fileContent(h)
	if err != nil {
		return err
	}
	if c.form == fileInline {
		_, err := w.Write(c.inline)
		return err
	}
	buf := block.AlignedBuffer(SlabBytes)
	var done int64
	for _, s := range c.slabs() {
		if err := o.v.dev.ReadAt(ctx, buf, SlabOff(s)); err != nil {
			return fmt.Errorf("read the content: %w", err)
		}
		n := min(SlabBytes, h.SizeBytes-done)
		if n == 0 {
			break
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
		done += n
		if progress != nil {
			progress(done)
		}
	}
	return nil
}
