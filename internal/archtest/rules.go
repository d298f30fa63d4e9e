package archtest

import "strings"

// Rules is what a tree is held to.
type Rules struct {
	Floors  []Floor
	Side    []string // folders, children included, that import anything and that nothing imports
	Bridges []Bridge
	Bans    []Ban

	// ReadsTime lists the folders, children included, that may read the clock and
	// sleep outside their tests.
	ReadsTime []string
	// MaxLines is the most lines of a file that is not generated.
	MaxLines int
	// BadNames are package names that say nothing of the content.
	BadNames []string
}

// Floor is one story of the house, from the ground up. A package imports only
// lower floors and its own children.
type Floor struct {
	Name     string
	Packages []string
	// TestOnly packages stand on this floor, but only tests, side packages and
	// other test-only packages import them.
	TestOnly []string
}

// Bridge permits one import between packages of equal height.
type Bridge struct{ From, To, Reason string }

// Ban forbids From to reach To through any chain of imports in the module.
// Entries of To that are not packages of the module are import paths, matched
// with all below them. An entry "*" of From is every package that is neither
// side nor test-only.
type Ban struct {
	From, To []string
	Reason   string
}

// place is where a package stands.
type place struct {
	height   int
	floor    string
	testOnly bool
	side     bool
}

func (r *Rules) find(folder string) (place, bool) {
	for height, f := range r.Floors {
		for _, p := range f.Packages {
			if p == folder {
				return place{height: height, floor: f.Name}, true
			}
		}
		for _, p := range f.TestOnly {
			if p == folder {
				return place{height: height, floor: f.Name, testOnly: true}, true
			}
		}
	}
	if within(folder, r.Side) {
		return place{height: len(r.Floors), floor: "side", side: true}, true
	}
	return place{}, false
}

// within reports whether name is one of roots or below one of them.
func within(name string, roots []string) bool {
	for _, root := range roots {
		if name == root || strings.HasPrefix(name, root+"/") {
			return true
		}
	}
	return false
}
