// Package archtest holds the module to its own rules: which package may import
// which, and the habits that a compiler does not check. Its test reads every Go
// file of the module, whatever its build tags, and fails with the reason of the
// rule that was broken.
//
// It judges imports and syntax only. It runs no code, resolves no types, and
// says nothing of what other modules import in turn.
//
// Invariant: a rule never passes because a file was not seen. A file that does
// not parse, and a package that the floor table lacks, are violations.
package archtest

import (
	"bytes"
	"errors"
	"fmt"
	"go/ast"
	"go/build/constraint"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
)

// Tree is the Go source of one module.
type Tree struct {
	Module   string
	Packages map[string]*Package // by folder, relative to the module; "." is the root

	fset *token.FileSet
}

// Package is a folder with Go files, its tests included.
type Package struct {
	Folder string
	Files  []*File // in name order
}

// File is one parsed source file.
type File struct {
	Path    string // relative to the module
	Test    bool   // named *_test.go
	E2E     bool   // built only under the tag e2e
	Lines   int
	Imports []Import

	syntax *ast.File
}

// Import is one import of a file.
type Import struct {
	Target string // the folder if it is in this module, else the import path
	Own    bool   // it is in this module
	Line   int
}

// Violation is one broken rule.
type Violation struct {
	Where string // "path:line", a path or a folder
	What  string
}

func (v Violation) String() string { return v.Where + ": " + v.What }

var errNoModule = errors.New("archtest: go.mod has no module line")

// Load reads the module whose root is fsys. It skips what the go command skips:
// testdata, folders that begin with "." or "_", and nested modules.
func Load(fsys fs.FS) (*Tree, error) {
	mod, err := fs.ReadFile(fsys, "go.mod")
	if err != nil {
		return nil, fmt.Errorf("archtest: %w", err)
	}
	t := &Tree{Packages: make(map[string]*Package), fset: token.NewFileSet()}
	if t.Module = moduleName(mod); t.Module == "" {
		return nil, errNoModule
	}
	err = fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name != "." && skipped(fsys, name) {
				return fs.SkipDir
			}
			return nil
		}
		base := path.Base(name)
		if !strings.HasSuffix(base, ".go") || base[0] == '.' || base[0] == '_' {
			return nil
		}
		return t.add(fsys, name)
	})
	if err != nil {
		return nil, fmt.Errorf("archtest: %w", err)
	}
	return t, nil
}

func moduleName(mod []byte) string {
	for line := range strings.Lines(string(mod)) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "module" {
			return f[1]
		}
	}
	return ""
}

func skipped(fsys fs.FS, dir string) bool {
	base := path.Base(dir)
	if base == "testdata" || base[0] == '.' || base[0] == '_' {
		return true
	}
	_, err := fs.Stat(fsys, path.Join(dir, "go.mod"))
	return err == nil
}

func (t *Tree) add(fsys fs.FS, name string) error {
	src, err := fs.ReadFile(fsys, name)
	if err != nil {
		return err
	}
	syntax, err := parser.ParseFile(t.fset, name, src, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return err
	}
	f := &File{
		Path:   name,
		Test:   strings.HasSuffix(name, "_test.go"),
		E2E:    needsTag(syntax, "e2e"),
		Lines:  bytes.Count(src, []byte{'\n'}),
		syntax: syntax,
	}
	for _, spec := range syntax.Imports {
		target, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return err
		}
		i := Import{Target: target, Line: t.line(spec.Pos())}
		if target == t.Module {
			i.Target, i.Own = ".", true
		} else if folder, ok := strings.CutPrefix(target, t.Module+"/"); ok {
			i.Target, i.Own = folder, true
		}
		f.Imports = append(f.Imports, i)
	}
	folder := path.Dir(name)
	p := t.Packages[folder]
	if p == nil {
		p = &Package{Folder: folder}
		t.Packages[folder] = p
	}
	p.Files = append(p.Files, f)
	return nil
}

// needsTag reports whether the file is left out unless tag is set, all other
// tags being set.
func needsTag(f *ast.File, tag string) bool {
	for _, group := range f.Comments {
		if group.Pos() >= f.Package {
			break
		}
		for _, c := range group.List {
			if !constraint.IsGoBuild(c.Text) {
				continue
			}
			expr, err := constraint.Parse(c.Text)
			if err != nil {
				return false // the go command refuses the file anyway
			}
			return !expr.Eval(func(t string) bool { return t != tag })
		}
	}
	return false
}

func (t *Tree) line(p token.Pos) int { return t.fset.Position(p).Line }

// folders lists the packages in a fixed order.
func (t *Tree) folders() []string {
	var names []string
	for name := range t.Packages {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
