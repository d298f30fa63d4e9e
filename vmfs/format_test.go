package vmfs_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"basalt/block/unit"
	"basalt/vmfs"
)

// span is where a field lies in its record.
type span struct{ off, size int }

// formatTables reads the tables of docs/format/volume.md that begin with an offset,
// by heading and then by field. A second table under one heading is "heading 2".
func formatTables(t *testing.T) map[string]map[string]span {
	t.Helper()
	page, err := os.ReadFile("../docs/format/volume.md")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]map[string]span{}
	heading, name, n := "", "", 0
	number := regexp.MustCompile(`^\d+$`)
	for _, line := range strings.Split(string(page), "\n") {
		if h, ok := strings.CutPrefix(strings.TrimLeft(line, "#"), " "); ok && strings.HasPrefix(line, "#") {
			heading, n = h, 0
		}
		cells := strings.Split(line, "|")
		if len(cells) < 5 {
			continue
		}
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		if cells[1] == "off" || cells[1] == "offset" {
			if n++; n > 1 {
				name = heading + " " + strconv.Itoa(n)
			} else {
				name = heading
			}
			out[name] = map[string]span{}
			continue
		}
		if !number.MatchString(cells[1]) || out[name] == nil {
			continue
		}
		off, _ := strconv.Atoi(cells[1])
		size := -1
		if number.MatchString(cells[2]) {
			size, _ = strconv.Atoi(cells[2])
		}
		field := cells[3]
		if field == "reserved" || field == "-" {
			field += " at " + cells[1]
		}
		out[name][field] = span{off, size}
	}
	return out
}

// TestFormatPageAgreesWithTheConstants compares the layout of docs/format/volume.md
// with the code.
func TestFormatPageAgreesWithTheConstants(t *testing.T) {
	tables := formatTables(t)
	want := map[string]span{
		"superblock, first copy": {vmfs.SuperblockOff, vmfs.SuperblockBytes},
		"volume unit":            {vmfs.VolumeUnitOff, vmfs.StrideBytes},
		"heartbeats of 256 slots, 4 KiB apart (lease.md §3)":           {vmfs.HeartbeatOff, vmfs.Slots * vmfs.StrideBytes},
		"registers of 256 slots, 4 KiB apart (lease.md §2)":            {vmfs.RegisterOff, vmfs.Slots * vmfs.StrideBytes},
		"256 scratch units, 4 KiB apart, for the self-test of a mount": {vmfs.ScratchOff, vmfs.ScratchUnits * vmfs.StrideBytes},
		"kept for locks on devices without COMPARE AND WRITE":          {vmfs.ScratchOff + vmfs.ScratchUnits*vmfs.StrideBytes, vmfs.GroupsOff - vmfs.ScratchOff - vmfs.ScratchUnits*vmfs.StrideBytes},
		"left alone: partition tables, labels":                         {0, vmfs.SuperblockOff},
		"groups":                                                       {vmfs.GroupsOff, -1},
	}
	if got := tables["2. Layout"]; !equalSpans(got, want) {
		t.Errorf("layout: the page says %v, the code %v", got, want)
	}
	place := map[string]span{
		"lock unit": {0, vmfs.StrideBytes}, "identity unit": {identityIn, vmfs.StrideBytes},
		"header copy A": {headerAIn, vmfs.HeaderBytes}, "header copy B": {headerBIn, vmfs.HeaderBytes},
	}
	if got := tables["2. Layout 2"]; !equalSpans(got, place) || headerBIn+vmfs.HeaderBytes != vmfs.ObjectBytes {
		t.Errorf("object's place: the page says %v, the code %v", got, place)
	}
	if got, want := tables["6. Folder payload"]["Content"].off, 48; got != want {
		t.Errorf("folder content at %d, want %d", got, want)
	}
	for record, bytes := range map[string]int{"3. Superblock": vmfs.SuperblockBytes, "5. Object header": vmfs.HeaderBytes, "6. Folder payload 4": 4096} {
		at := 0
		for range tables[record] { // each field begins where another ends
			for _, s := range tables[record] {
				if s.off == at {
					at += s.size
					break
				}
			}
		}
		if at != bytes {
			t.Errorf("%s: the fields fill %d bytes of %d", record, at, bytes)
		}
	}
}

func equalSpans(a, b map[string]span) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if b[k] != v {
			return false
		}
	}
	return true
}

// changedBy are the bytes in which two encodings differ, the checksum aside.
func changedBy(a, b []byte) span {
	first, end := -1, 0
	for i := 4; i < len(a); i++ {
		if a[i] != b[i] {
			if first < 0 {
				first = i
			}
			end = i + 1
		}
	}
	return span{first, end - first}
}

// compare encodes a record with one field changed at a time: exactly the bytes that
// the page gives to that field may differ, its first and last among them.
func compare[R any](t *testing.T, table map[string]span, base R, encode func(R) []byte, fields map[string]func(*R)) {
	t.Helper()
	plain := encode(base)
	for name, edit := range fields {
		s, ok := table[name]
		if !ok {
			t.Errorf("the page has no field %q", name)
			continue
		}
		if edit == nil {
			continue // compared by its content
		}
		r := base
		edit(&r)
		if got := changedBy(plain, encode(r)); got != s {
			t.Errorf("%s: changes bytes %+v, the page says %+v", name, got, s)
		}
	}
	for name := range table {
		switch {
		case has(fields, name), strings.HasPrefix(name, "reserved"), name == "CRC", name == "Magic", name == "Version":
		default:
			t.Errorf("no test for field %q of the page", name)
		}
	}
}

func has[V any](m map[string]V, name string) bool {
	_, ok := m[name]
	return ok
}

func TestFormatPageAgreesWithTheEncoders(t *testing.T) {
	tables := formatTables(t)
	uuid := [16]byte{0: 0xff, 15: 0xff}
	all := strings.Repeat("\x7e", 255)
	far := time.Unix(0, 0x7fffffffffffffff)
	zero := time.Unix(0, 0)

	compare(t, tables["3. Superblock"], vmfs.Superblock{Created: zero}, func(s vmfs.Superblock) []byte {
		b := make([]byte, vmfs.SuperblockBytes)
		s.Encode(b, vmfs.SuperblockOff)
		return b
	}, map[string]func(*vmfs.Superblock){
		"Volume": func(s *vmfs.Superblock) { s.Volume = uuid }, "Sequence": func(s *vmfs.Superblock) { s.Sequence = ^s.Sequence },
		"SizeBytes": func(s *vmfs.Superblock) { s.SizeBytes = ^s.SizeBytes }, "UnitBytes": func(s *vmfs.Superblock) { s.UnitBytes = 0xffffffff },
		"LeaseMillis": func(s *vmfs.Superblock) { s.Lease = 0xffffffff * time.Millisecond }, "Compat": func(s *vmfs.Superblock) { s.Compat = ^s.Compat },
		"ROCompat": func(s *vmfs.Superblock) { s.ROCompat = ^s.ROCompat }, "Incompat": func(s *vmfs.Superblock) { s.Incompat = ^s.Incompat },
		"MiddleGroup": func(s *vmfs.Superblock) { s.MiddleGroup = ^s.MiddleGroup }, "Created": func(s *vmfs.Superblock) { s.Created = far },
		"LabelLen": nil, "Label": nil,
	})
	compare(t, tables["5. Object header"], vmfs.Header{Created: zero, Modified: zero}, func(h vmfs.Header) []byte {
		b := make([]byte, vmfs.HeaderBytes)
		h.Encode(b, testVolume, vmfs.GroupsOff)
		return b
	}, map[string]func(*vmfs.Header){
		"Sequence": func(h *vmfs.Header) { h.Sequence = ^h.Sequence }, "LockGeneration": func(h *vmfs.Header) { h.LockGeneration = ^h.LockGeneration },
		"Self.Slot": func(h *vmfs.Header) { h.Self.Slot = ^h.Self.Slot }, "Self.Incarnation": func(h *vmfs.Header) { h.Self.Incarnation = 0xffff },
		"Kind": func(h *vmfs.Header) { h.Kind = 5 }, "SizeBytes": func(h *vmfs.Header) { h.SizeBytes = -1 },
		"Created": func(h *vmfs.Header) { h.Created = far }, "Modified": func(h *vmfs.Header) { h.Modified = far },
		"Origin.Slot": func(h *vmfs.Header) { h.Origin.Slot = ^h.Origin.Slot }, "Origin.Incarnation": func(h *vmfs.Header) { h.Origin.Incarnation = 0xffff },
		"IntentCount": nil, "Intents": nil, "PayloadLen": nil, "Payload": nil,
		"OriginUUID": func(h *vmfs.Header) { h.OriginUUID = uuid },
	})
	inUnit := func(body []byte) []byte { return append(make([]byte, unit.HeadBytes), body...) }
	holders := func(n int) (out []vmfs.Holder) {
		for range n {
			out = append(out, vmfs.Holder{Slot: 0xff, Generation: 0xffffffff})
		}
		return out
	}
	compare(t, tables["4.3 Lock unit"], vmfs.LockRecord{Since: time.UnixMilli(0)}, func(l vmfs.LockRecord) []byte { return inUnit(l.Encode(make([]byte, 512))) },
		map[string]func(*vmfs.LockRecord){
			"Mode": func(l *vmfs.LockRecord) { l.Mode = 3 }, "Owner.Slot": func(l *vmfs.LockRecord) { l.Owner.Slot = 255 },
			"Target.Slot": func(l *vmfs.LockRecord) { l.Target.Slot = 255 }, "Owner.Generation": func(l *vmfs.LockRecord) { l.Owner.Generation = 1<<32 - 1 },
			"Generation": func(l *vmfs.LockRecord) { l.Generation = ^l.Generation }, "Target.Generation": func(l *vmfs.LockRecord) { l.Target.Generation = 1<<32 - 1 },
			"Want": func(l *vmfs.LockRecord) { l.Want = ^l.Want }, "Waiter.Slot": func(l *vmfs.LockRecord) { l.Waiter.Slot = 255 },
			"Waiter.Generation": func(l *vmfs.LockRecord) { l.Waiter.Generation = 1<<32 - 1 }, "Since": func(l *vmfs.LockRecord) { l.Since = time.UnixMilli(-1) },
			"Holders": nil, "Slots": nil, "Generations": nil,
		})
	compare(t, tables["4.4 Identity unit"], vmfs.Identity{}, func(id vmfs.Identity) []byte { return inUnit(id.Encode(make([]byte, 512))) },
		map[string]func(*vmfs.Identity){
			"State": func(id *vmfs.Identity) { id.State = 2 }, "Kind": func(id *vmfs.Identity) { id.Kind = 5 }, "Incarnation": func(id *vmfs.Identity) { id.Incarnation = 0xffff },
			"Parent.Slot": func(id *vmfs.Identity) { id.Parent.Slot = ^id.Parent.Slot }, "Parent.Incarnation": func(id *vmfs.Identity) { id.Parent.Incarnation = 0xffff },
			"Pending.Delta": func(id *vmfs.Identity) { id.Pending.Delta = -1 }, "Pending.Actor.Slot": func(id *vmfs.Identity) { id.Pending.Actor.Slot = 255 },
			"Pending.Actor.Generation":  func(id *vmfs.Identity) { id.Pending.Actor.Generation = 1<<32 - 1 },
			"Pending.Child.Slot":        func(id *vmfs.Identity) { id.Pending.Child.Slot = 1<<32 - 1 },
			"Pending.Child.Incarnation": func(id *vmfs.Identity) { id.Pending.Child.Incarnation = 0xffff },
			"Count":                     func(id *vmfs.Identity) { id.Count = ^id.Count },
			"HoldCount":                 nil, "NameLen": nil, "Hold slots": nil, "Hold generations": nil, "Name": nil,
		})
	// Lengths and the arrays that they count change together.
	id := vmfs.Identity{Holds: holders(vmfs.MaxHolds), Name: all}
	b := inUnit(id.Encode(make([]byte, 512)))
	idTable := tables["4.4 Identity unit"]
	for name, want := range map[string][]byte{
		"HoldCount": {vmfs.MaxHolds}, "NameLen": {255}, "Hold slots": bytes.Repeat([]byte{255}, 32), "Hold generations": bytes.Repeat([]byte{255}, 128), "Name": []byte(all),
	} {
		field(t, name, b, idTable, want)
	}
	l := vmfs.LockRecord{Mode: vmfs.LockShared, Shared: holders(vmfs.MaxSharedHolders)}
	b = inUnit(l.Encode(make([]byte, 512)))
	for name, want := range map[string][]byte{"Holders": {64}, "Slots": bytes.Repeat([]byte{255}, 64), "Generations": bytes.Repeat([]byte{255}, 256)} {
		field(t, name, b, tables["4.3 Lock unit"], want)
	}
	h := vmfs.Header{Payload: bytes.Repeat([]byte{255}, vmfs.MaxPayload), Created: zero, Modified: zero}
	for range 64 {
		h.Intents = append(h.Intents, 1<<32-1)
	}
	b = make([]byte, vmfs.HeaderBytes)
	h.Encode(b, testVolume, vmfs.GroupsOff)
	for name, want := range map[string][]byte{
		"IntentCount": {64, 0}, "Intents": bytes.Repeat([]byte{255}, 256), "Payload": h.Payload,
		"PayloadLen": binary.LittleEndian.AppendUint32(nil, vmfs.MaxPayload),
	} {
		field(t, name, b, tables["5. Object header"], want)
	}
	sb := vmfs.Superblock{Label: strings.Repeat("l", vmfs.MaxLabelBytes), Created: zero}
	b = make([]byte, vmfs.SuperblockBytes)
	sb.Encode(b, vmfs.SuperblockOff)
	for name, want := range map[string][]byte{"LabelLen": {64}, "Label": []byte(sb.Label), "Version": {1, 0, 0, 0}, "Magic": []byte("BASALTFS")} {
		field(t, name, b, tables["3. Superblock"], want)
	}
}

func field(t *testing.T, name string, b []byte, table map[string]span, want []byte) {
	t.Helper()
	s, ok := table[name]
	if !ok || s.size != len(want) || !bytes.Equal(b[s.off:s.off+s.size], want) {
		t.Errorf("%s: not where the page says, %+v", name, s)
	}
}
