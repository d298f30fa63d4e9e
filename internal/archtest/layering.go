package archtest

import (
	"fmt"
	"slices"
	"strings"
)

// Layering checks every import against the floors and every chain of imports
// against the bans.
func (r *Rules) Layering(t *Tree) []Violation {
	var found []Violation
	for _, folder := range t.folders() {
		from, known := r.find(folder)
		if !known {
			found = append(found, Violation{folder,
				"package is on no floor: add it to House in internal/archtest/house.go"})
			continue
		}
		for _, f := range t.Packages[folder].Files {
			for _, i := range f.Imports {
				if what := r.judge(folder, from, f, i); what != "" {
					found = append(found, Violation{fmt.Sprintf("%s:%d", f.Path, i.Line), what})
				}
			}
		}
	}
	for _, b := range r.Bans {
		found = append(found, r.enforce(t, b)...)
	}
	return found
}

// judge returns what is wrong with one import, or "".
func (r *Rules) judge(folder string, from place, f *File, i Import) string {
	if !i.Own || from.side || i.Target == folder {
		return ""
	}
	to, known := r.find(i.Target)
	if !known {
		return "" // reported once, where the package is
	}
	var law string
	switch {
	case f.Test && f.E2E && to.side, f.Test && to.testOnly:
		return ""
	case to.side:
		law = "side packages may import anything, and nothing imports them; only test files under the tag e2e may"
	case to.testOnly && !from.testOnly:
		law = "only tests may use it; a simulated or faulty device must not ship in the binary"
	case to.height < from.height:
		return ""
	case to.height > from.height:
		law = "a package never imports a higher floor; declare an interface here and let the higher floor satisfy it"
	case f.Test:
		return "" // equal height: a test may stand a package beside its peers
	case strings.HasPrefix(i.Target, folder+"/"):
		return ""
	case r.bridged(folder, i.Target):
		return ""
	default:
		law = "a package never imports its own floor; declare an interface here and let a higher floor wire it"
	}
	if reason := r.reason(folder, i.Target); reason != "" {
		law += " (" + reason + ")"
	}
	return fmt.Sprintf("%s (floor %d, %s) imports %s (floor %d, %s): %s",
		folder, from.height, from.floor, i.Target, to.height, to.floor, law)
}

func (r *Rules) bridged(from, to string) bool {
	return slices.ContainsFunc(r.Bridges, func(b Bridge) bool { return b.From == from && b.To == to })
}

// reason finds what a ban says of an edge.
func (r *Rules) reason(from, to string) string {
	for _, b := range r.Bans {
		if slices.Contains(b.From, from) && within(to, b.To) {
			return b.Reason
		}
	}
	return ""
}

// enforce reports, for each package that b binds, the shortest chain to what it
// must not reach.
func (r *Rules) enforce(t *Tree, b Ban) []Violation {
	var found []Violation
	for _, folder := range t.folders() {
		if !r.binds(b, folder) {
			continue
		}
		if chain := t.chain(folder, b.To); chain != nil {
			found = append(found, Violation{folder, strings.Join(chain, " -> ") + ": " + b.Reason})
		}
	}
	return found
}

func (r *Rules) binds(b Ban, folder string) bool {
	if slices.Contains(b.From, folder) {
		return true
	}
	at, known := r.find(folder)
	return known && !at.side && !at.testOnly && slices.Contains(b.From, "*")
}

// chain is the shortest path of imports outside tests from a package to one
// within targets, both ends included, or nil.
func (t *Tree) chain(from string, targets []string) []string {
	paths := [][]string{{from}}
	seen := map[string]bool{from: true}
	for len(paths) > 0 {
		path := paths[0]
		paths = paths[1:]
		p := t.Packages[path[len(path)-1]]
		if p == nil {
			continue
		}
		for _, f := range p.Files {
			if f.Test {
				continue
			}
			for _, i := range f.Imports {
				if seen[i.Target] {
					continue
				}
				seen[i.Target] = true
				next := append(slices.Clone(path), i.Target)
				if within(i.Target, targets) {
					return next
				}
				if i.Own {
					paths = append(paths, next)
				}
			}
		}
	}
	return nil
}
