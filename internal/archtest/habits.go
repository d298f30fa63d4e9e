package archtest

import (
	"fmt"
	"go/ast"
	"path"
	"slices"
	"strings"
)

// Habits checks what each package and file must look like.
func (r *Rules) Habits(t *Tree) []Violation {
	var found []Violation
	for _, folder := range t.folders() {
		p := t.Packages[folder]
		found = append(found, r.names(p)...)
		found = append(found, contract(p)...)
		for _, f := range p.Files {
			if f.Lines > r.MaxLines && !ast.IsGenerated(f.syntax) {
				found = append(found, Violation{f.Path, fmt.Sprintf(
					"%d lines, more than %d: one file per noun, split it", f.Lines, r.MaxLines)})
			}
			found = append(found, r.clocks(t, folder, f)...)
		}
	}
	return found
}

func (r *Rules) names(p *Package) []Violation {
	bad := path.Base(p.Folder)
	if !slices.Contains(r.BadNames, bad) {
		bad = strings.TrimSuffix(p.Files[0].syntax.Name.Name, "_test")
	}
	if !slices.Contains(r.BadNames, bad) {
		return nil
	}
	return []Violation{{p.Folder, fmt.Sprintf(
		"the name %q says nothing: put the code beside its caller, or name the idea", bad)}}
}

// contract demands one package comment per folder.
func contract(p *Package) []Violation {
	var at []string
	for _, f := range p.Files {
		if doc := f.syntax.Doc; doc != nil && strings.TrimSpace(doc.Text()) != "" {
			at = append(at, f.Path)
		}
	}
	switch len(at) {
	case 1:
		return nil
	case 0:
		return []Violation{{p.Folder, "no package comment: one file opens with the package's contract"}}
	}
	return []Violation{{p.Folder, "several package comments: keep one of " + strings.Join(at, ", ")}}
}

// clocks finds reads of the machine's clock and sleeps.
func (r *Rules) clocks(t *Tree, folder string, f *File) []Violation {
	name := timeName(f.syntax)
	if name == "" {
		return nil
	}
	free := within(folder, r.ReadsTime)
	var found []Violation
	ast.Inspect(f.syntax, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		if id, ok := sel.X.(*ast.Ident); !ok || id.Name != name {
			return true
		}
		what := ""
		switch sel.Sel.Name {
		case "Now", "Since", "Until":
			if !free && !f.E2E {
				what = "time is an argument (internal/clock), or tests and simulations cannot step it"
			}
		case "Sleep":
			if f.Test {
				what = "wait for the event with a deadline, or step the clock; a sleep is slow and flaky"
			} else if !free {
				what = "wait on a timer of internal/clock, which ends when the owner closes"
			}
		}
		if what != "" {
			found = append(found, Violation{fmt.Sprintf("%s:%d", f.Path, t.line(n.Pos())),
				"time." + sel.Sel.Name + ": " + what})
		}
		return true
	})
	return found
}

// timeName is what the file calls package time, or "" if it does not import it.
func timeName(f *ast.File) string {
	for _, spec := range f.Imports {
		if spec.Path.Value != `"time"` {
			continue
		}
		if spec.Name != nil {
			return spec.Name.Name
		}
		return "time"
	}
	return ""
}
