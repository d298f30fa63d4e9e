package layout_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"basalt/thinprov/layout"
)

// row is a line of a byte table.
type row struct {
	off, size int
	text      string
}

var tableRow = regexp.MustCompile(`^\s*(\d+)\s+(\d+|\.\.\.)\s+(\S.*)$`)

// tables finds the byte tables in the comments of the package, by type.
func tables(t *testing.T) map[string][]row {
	t.Helper()
	out := make(map[string][]row)
	for _, file := range []string{"layout.go", "header.go", "node.go", "snapshot.go", "log.go"} {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range f.Decls {
			g, ok := decl.(*ast.GenDecl)
			if !ok || g.Tok != token.TYPE || g.Doc == nil {
				continue
			}
			name := g.Specs[0].(*ast.TypeSpec).Name.Name
			_, body, found := strings.Cut(g.Doc.Text(), "off  size  field")
			if !found {
				continue
			}
			for _, line := range strings.Split(body, "\n")[1:] {
				m := tableRow.FindStringSubmatch(line)
				if m == nil {
					break
				}
				off, _ := strconv.Atoi(m[1])
				size, _ := strconv.Atoi(m[2]) // 0 for "..."
				out[name] = append(out[name], row{off, size, m[3]})
			}
		}
	}
	return out
}

func TestByteTablesHaveNoHolesAndFillTheRecord(t *testing.T) {
	want := map[string]int{
		"Pointer": layout.PointerBytes, "NodeHead": layout.BlockBytes, "Extent": layout.ExtentBytes, "Slab": layout.SlabEntryBytes,
		"Snapshot": layout.SnapshotBytes, "Published": layout.PublishedBytes, "Header": layout.HeaderBytes,
		"RecordHead": layout.RecordHeadBytes, "Entry": 8,
	}
	got := tables(t)
	for name, size := range want {
		at := 0
		for _, r := range got[name] {
			if r.off != at {
				t.Errorf("%s: %q is at %d, the row before ends at %d", name, r.text, r.off, at)
			}
			at = r.off + r.size
		}
		if at != size {
			t.Errorf("%s: the table covers %d bytes of %d", name, at, size)
		}
	}
}

// The page and the comments hold the same tables.
func TestPageHasTheTablesOfTheCode(t *testing.T) {
	page, err := os.ReadFile("../../docs/format/disk.md")
	if err != nil {
		t.Fatal(err)
	}
	for name, rows := range tables(t) {
		var want strings.Builder
		want.WriteString("| off | size | field |\n|---|---|---|\n")
		for _, r := range rows {
			size := strconv.Itoa(r.size)
			if r.size == 0 {
				size = "…"
			}
			fmt.Fprintf(&want, "| %d | %s | %s |\n", r.off, size, strings.Join(strings.Fields(r.text), " "))
		}
		_, have, found := strings.Cut(string(page), "<!-- table "+name+" -->\n")
		if !found || !strings.HasPrefix(have, want.String()) {
			t.Errorf("docs/format/disk.md: the table of %s should be\n%s", name, want.String())
		}
	}
}

// Each field of a table is where the encoder puts it.
func TestHeaderFieldsAreWhereTheTableSays(t *testing.T) {
	b := make([]byte, layout.HeaderBytes)
	h := layout.Header{
		UUID: [16]byte{1}, SizeBytes: 2 << 20, Epoch: 3, Parent: 2, Checkpoint: 5, LockGen: 6, Flags: layout.HeaderClean,
		Self: layout.Ref{Slot: 7, Incarnation: 8}, Origin: layout.Ref{Slot: 9, Incarnation: 10}, OriginEpoch: 11, Created: 12,
		Mapped: 14, Own: 13, BootID: [16]byte{15}, LogOff: 4096, LogSeq: 16, LogPrev: 17, Ring: []uint64{18, 19},
		ClaimKind: layout.SlabTree, ClaimUnits: []uint32{20}, Releasing: []uint64{21},
	}
	h.EncodeInto([16]byte{1}, b)
	first := map[string]byte{
		"UUID": 1, "Epoch": 3, "Parent": 2, "Checkpoint": 5, "LockGen": 6, "Flags": 1, "Slot": 7, "Incarnation": 8, "OriginInc": 10,
		"OriginSlot": 9, "OriginEpoch": 11, "Created": 12, "Mapped": 14, "Own": 13, "BootID": 15, "LogSeq": 16, "LogPrev": 17,
		"LogSlabs": 2, "Ring": 18, "ClaimKind": 2, "ClaimUnits": 1, "Units": 20, "Releasing": 1, "Release": 21,
	}
	for _, r := range tables(t)["Header"] {
		name := strings.Fields(r.text)[0]
		if want, known := first[name]; known && b[r.off] != want {
			t.Errorf("%s at %d holds %d, want %d", name, r.off, b[r.off], want)
		}
	}
	got, err := layout.DecodeHeader([16]byte{1}, b)
	if err != nil || fmt.Sprint(got) != fmt.Sprint(h) {
		t.Errorf("decoded %+v, %v, want %+v", got, err, h)
	}
}
