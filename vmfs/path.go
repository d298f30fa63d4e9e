package vmfs

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// rootRef is the root folder; it is never removed.
var rootRef = Ref{Slot: rootSlot, Incarnation: 1}

// SplitPath checks an absolute or relative path and gives its names; none for the
// root.
func SplitPath(path string) ([]string, error) {
	trimmed := strings.Trim(path, "/")
	if trimmed == "" {
		return nil, nil
	}
	names := strings.Split(trimmed, "/")
	for _, n := range names {
		if err := CheckName(n); err != nil {
			return nil, err
		}
	}
	return names, nil
}

// Info is an object as a listing shows it.
type Info struct {
	Ref      Ref
	Kind     Kind
	Name     string
	Identity Identity
}

// Lookup finds an object by its path, without locks.
func (v *Volume) Lookup(ctx context.Context, path string) (Info, error) {
	names, err := SplitPath(path)
	if err != nil {
		return Info{}, err
	}
	at := Info{Ref: rootRef, Kind: KindFolder}
	if len(names) == 0 {
		_, id, err := v.readIdentity(ctx, rootSlot)
		if err != nil {
			return Info{}, err
		}
		at.Identity = *id
	}
	for i, name := range names {
		if at.Kind != KindFolder {
			return Info{}, fmt.Errorf("/%s: %w", strings.Join(names[:i], "/"), ErrNotFolder)
		}
		next, err := v.find(ctx, at.Ref, name)
		if err != nil {
			return Info{}, fmt.Errorf("/%s: %w", strings.Join(names[:i+1], "/"), err)
		}
		at = next
	}
	return at, nil
}

// find looks a name up in a folder, which has just been seen to be one, without its
// lock.
func (v *Volume) find(ctx context.Context, folder Ref, name string) (Info, error) {
	entries, err := v.entriesOf(ctx, &Object{v: v, ref: folder, kind: KindFolder})
	if err != nil {
		return Info{}, err
	}
	return v.findIn(ctx, folder, entries, name)
}

// findIn gives the first entry of the name that its identity agrees with.
func (v *Volume) findIn(ctx context.Context, folder Ref, entries []Entry, name string) (Info, error) {
	for _, e := range entries {
		if e.Name != name {
			continue
		}
		info, agrees, err := v.confirm(ctx, folder, e)
		if err != nil {
			return Info{}, err
		}
		if agrees {
			return info, nil
		}
	}
	return Info{}, ErrNotFound
}

// confirm asks an entry's identity whether the entry holds (R4).
func (v *Volume) confirm(ctx context.Context, folder Ref, e Entry) (Info, bool, error) {
	_, id, err := v.readIdentity(ctx, e.Ref.Slot)
	if err != nil {
		return Info{}, false, err
	}
	agrees := id.State == StateLive && id.Incarnation == e.Ref.Incarnation && id.Parent == folder && id.Name == e.Name
	return Info{Ref: e.Ref, Kind: id.Kind, Name: e.Name, Identity: *id}, agrees, nil
}

// List gives the objects in a folder, in no order, without locks.
func (v *Volume) List(ctx context.Context, folder Ref) ([]Info, error) {
	entries, err := v.entries(ctx, folder)
	if err != nil {
		return nil, err
	}
	out := make([]Info, 0, len(entries))
	for _, e := range entries {
		info, agrees, err := v.confirm(ctx, folder, e)
		if err != nil {
			return nil, err
		}
		if agrees {
			out = append(out, info)
		}
	}
	return out, nil
}

// Walk calls f for every object below a folder, folders before their content.
// path is relative to the folder. What disappears meanwhile is skipped.
func (v *Volume) Walk(ctx context.Context, folder Ref, f func(path string, info Info) error) error {
	return v.walk(ctx, folder, "", 0, f)
}

// maxDepth bounds the nesting of folders that a walk follows.
const maxDepth = 64

func (v *Volume) walk(ctx context.Context, folder Ref, prefix string, depth int, f func(string, Info) error) error {
	if depth > maxDepth {
		return fmt.Errorf("%s: %w: folders nest at most %d deep", prefix, ErrName, maxDepth)
	}
	list, err := v.List(ctx, folder)
	if errors.Is(err, ErrNotFound) && depth > 0 {
		return nil
	}
	if err != nil {
		return err
	}
	for _, info := range list {
		path := prefix + info.Name
		if err := f(path, info); err != nil {
			return err
		}
		if info.Kind == KindFolder {
			if err := v.walk(ctx, info.Ref, path+"/", depth+1, f); err != nil {
				return err
			}
		}
	}
	return nil
}

// parentOf splits a path into its folder, looked up, and its last name.
func (v *Volume) parentOf(ctx context.Context, path string) (Ref, string, error) {
	names, err := SplitPath(path)
	if err != nil {
		return Ref{}, "", err
	}
	if len(names) == 0 {
		return Ref{}, "", fmt.Errorf("%w: the root folder is meant", ErrName)
	}
	if len(names) > maxDepth {
		return Ref{}, "", fmt.Errorf("%w: folders nest at most %d deep", ErrName, maxDepth)
	}
	dir := strings.Join(names[:len(names)-1], "/")
	parent, err := v.Lookup(ctx, dir)
	if err != nil {
		return Ref{}, "", err
	}
	if parent.Kind != KindFolder {
		return Ref{}, "", fmt.Errorf("/%s: %w", dir, ErrNotFolder)
	}
	return parent.Ref, names[len(names)-1], nil
}
