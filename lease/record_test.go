package lease_test

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"basalt/block"
	"basalt/lease"
)

func fullRegister() lease.Register {
	return lease.Register{
		Generation: 0x01020304, Phase: lease.Kill, Server: true, BreakerSlot: 200, BreakerGeneration: 77, Calls: 12345,
		HostID:  [16]byte{1, 2, 3, 15: 16},
		Process: block.Process{BootID: [16]byte{9, 15: 8}, PID: 4711, StartTicks: 1 << 40, PIDNS: 4026531836},
		Fencers: block.FencePR | block.FencePerson, Lease: 8 * time.Second,
		ClaimedAt: time.Date(2026, 3, 4, 5, 6, 7, 8, time.UTC), Claim: 1 << 63,
		Address: strings.Repeat("a", lease.MaxAddress), HostName: strings.Repeat("h", lease.MaxHostName),
	}
}

func TestRegisterReadsBackAsWritten(t *testing.T) {
	short := fullRegister()
	short.HostName, short.Address = "h", ""
	for _, want := range []lease.Register{fullRegister(), short, {}} {
		b := bytes.Repeat([]byte{0xa5}, 4096)
		want.EncodeInto(b)
		got, err := lease.DecodeRegister(b)
		if err != nil || got != want {
			t.Fatalf("%v\n got %+v\nwant %+v", err, got, want)
		}
	}
}

func TestRegisterKeepsWhatIsReserved(t *testing.T) {
	b := bytes.Repeat([]byte{0xa5}, lease.RegisterBytes)
	fullRegister().EncodeInto(b)
	for _, span := range [][2]int{{0, 24}, {100, 104}, {184, 257}} {
		for i := span[0]; i < span[1]; i++ {
			if b[i] != 0xa5 {
				t.Fatalf("byte %d was changed", i)
			}
		}
	}
}

func TestRegisterOutOfRangeIsRefused(t *testing.T) {
	for name, spoil := range map[string]func(b []byte){
		"phase":               func(b []byte) { b[28] = 4 },
		"live without gen":    func(b []byte) { clear(b[24:]); b[28] = 1 },
		"live with a breaker": func(b []byte) { b[28] = 1 },
		"no name":             func(b []byte) { b[31] = 0; clear(b[257:]) },
		"name past its end":   func(b []byte) { b[31] = 3 },
		"zero in name":        func(b []byte) { b[300] = 0 },
		"address after zero":  func(b []byte) { b[130] = 0 },
		"lease of zero":       func(b []byte) { clear(b[96:100]) },
		"endless lease":       func(b []byte) { b[99] = 0xff },
		"too short":           nil,
	} {
		b := make([]byte, lease.RegisterBytes)
		fullRegister().EncodeInto(b)
		if spoil == nil {
			b = b[:511]
		} else {
			spoil(b)
		}
		if r, err := lease.DecodeRegister(b); err == nil {
			t.Errorf("%s: accepted as %+v", name, r)
		}
	}
}

func TestGenerationIsDeadWhenDoneFreeOrPassed(t *testing.T) {
	for _, c := range []struct {
		phase lease.Phase
		g     uint32
		want  bool
	}{
		{lease.Live, 4, true}, {lease.Live, 5, false}, {lease.Live, 6, false},
		{lease.Kill, 4, true}, {lease.Kill, 5, false},
		{lease.Done, 5, true}, {lease.Done, 6, false},
		{lease.Free, 5, true}, {lease.Free, 6, false},
	} {
		if got := (lease.Register{Generation: 5, Phase: c.phase}).Dead(c.g); got != c.want {
			t.Errorf("register at 5 %v: dead(%d) = %v", c.phase, c.g, got)
		}
	}
}

func TestHeartbeatIsBoundToVolumeAndAddress(t *testing.T) {
	volume := [16]byte{1}
	want := lease.Heartbeat{Generation: 3, Sequence: 1 << 50, Nonce: 1<<64 - 1, WrittenAt: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)}
	b := bytes.Repeat([]byte{0xff}, 512)
	want.Encode(b, volume, 4096)
	if got, err := lease.DecodeHeartbeat(b, volume, 4096); err != nil || got != want {
		t.Fatalf("%v, %+v", err, got)
	}
	var damaged *block.CorruptError
	if _, err := lease.DecodeHeartbeat(b, [16]byte{2}, 4096); !errors.As(err, &damaged) {
		t.Errorf("another volume's: %v", err)
	}
	if _, err := lease.DecodeHeartbeat(b, volume, 8192); !errors.As(err, &damaged) {
		t.Errorf("another slot's: %v", err)
	}
	for i := range b {
		b[i] ^= 1
		if _, err := lease.DecodeHeartbeat(b, volume, 4096); !errors.As(err, &damaged) {
			t.Errorf("byte %d flipped: %v", i, err)
		}
		b[i] ^= 1
	}
}

// The tables of docs/format/lease.md are normative: each field is where they say.
func TestFormatPageAgreesWithTheCode(t *testing.T) {
	page, err := os.ReadFile("../docs/format/lease.md")
	if err != nil {
		t.Fatal(err)
	}
	tables := formatTables(t, string(page))
	reg := fullRegister()
	spots := map[string]func(r *lease.Register){
		"Generation":        func(r *lease.Register) { r.Generation = ^r.Generation },
		"Phase":             func(r *lease.Register) { r.Phase = lease.Done },
		"Flags":             func(r *lease.Register) { r.Server = false },
		"BreakerSlot":       func(r *lease.Register) { r.BreakerSlot = ^r.BreakerSlot },
		"BreakerGeneration": func(r *lease.Register) { r.BreakerGeneration = ^r.BreakerGeneration },
		"Calls":             func(r *lease.Register) { r.Calls = ^r.Calls },
		"HostID":            func(r *lease.Register) { r.HostID[0], r.HostID[15] = 77, 77 },
		"BootID":            func(r *lease.Register) { r.Process.BootID[0], r.Process.BootID[15] = 77, 77 },
		"PID":               func(r *lease.Register) { r.Process.PID = ^r.Process.PID },
		"Fencers":           func(r *lease.Register) { r.Fencers = ^r.Fencers },
		"StartTicks":        func(r *lease.Register) { r.Process.StartTicks = ^r.Process.StartTicks },
		"PIDNamespace":      func(r *lease.Register) { r.Process.PIDNS = ^r.Process.PIDNS },
		"LeaseMillis":       func(r *lease.Register) { r.Lease = 0x00010101 * time.Millisecond },
		"ClaimedAt":         func(r *lease.Register) { r.ClaimedAt = time.Unix(0, ^r.ClaimedAt.UnixNano()) },
		"Claim":             func(r *lease.Register) { r.Claim = ^r.Claim },
		"Address":           func(r *lease.Register) { r.Address = strings.Repeat("b", lease.MaxAddress) },
		"HostName":          func(r *lease.Register) { r.HostName = strings.Repeat("i", lease.MaxHostName) },
	}
	old := make([]byte, lease.RegisterBytes)
	reg.EncodeInto(old)
	at := 24
	for _, f := range tables["register"] {
		if f.off != at {
			t.Errorf("%s at %d leaves a hole or overlaps: want %d", f.name, f.off, at)
		}
		at += f.size
		change := spots[f.name]
		if f.name == "reserved" || f.name == "HostNameBytes" {
			continue
		}
		if change == nil {
			t.Errorf("the page has a field %s that the code lacks", f.name)
			continue
		}
		delete(spots, f.name)
		r := reg
		change(&r)
		b := make([]byte, lease.RegisterBytes)
		r.EncodeInto(b)
		first, last := differs(old, b)
		if first < f.off || last >= f.off+f.size || f.name != "LeaseMillis" && f.name != "Fencers" && (first != f.off || last != f.off+f.size-1) {
			t.Errorf("%s is at bytes %d to %d, the page says %d to %d", f.name, first, last, f.off, f.off+f.size-1)
		}
	}
	if at != lease.RegisterBytes || len(spots) > 0 {
		t.Errorf("the register's table ends at %d and lacks %d fields", at, len(spots))
	}
	checkHeartbeatTable(t, tables["heartbeat"])
}

func checkHeartbeatTable(t *testing.T, table []formatField) {
	old, one := make([]byte, 512), lease.Heartbeat{Generation: 1, Sequence: 1, Nonce: 1, WrittenAt: time.Unix(0, 1)}
	one.Encode(old, [16]byte{}, 0)
	spots := map[string]lease.Heartbeat{
		"Generation": {Generation: 1<<32 - 2, Sequence: 1, Nonce: 1, WrittenAt: time.Unix(0, 1)},
		"Sequence":   {Generation: 1, Sequence: 1<<64 - 2, Nonce: 1, WrittenAt: time.Unix(0, 1)},
		"Nonce":      {Generation: 1, Sequence: 1, Nonce: 1<<64 - 2, WrittenAt: time.Unix(0, 1)},
		"WrittenAt":  {Generation: 1, Sequence: 1, Nonce: 1, WrittenAt: time.Unix(0, -2)},
	}
	at := 0
	for _, f := range table {
		if f.off != at {
			t.Errorf("%s at %d, want %d", f.name, f.off, at)
		}
		at += f.size
		h, ok := spots[f.name]
		if !ok {
			continue
		}
		delete(spots, f.name)
		b := make([]byte, 512)
		h.Encode(b, [16]byte{}, 0)
		if first, last := differs(old[4:], b[4:]); first+4 != f.off || last+4 != f.off+f.size-1 {
			t.Errorf("heartbeat's %s is at bytes %d to %d, the page says %d to %d", f.name, first+4, last+4, f.off, f.off+f.size-1)
		}
	}
	if at != lease.HeartbeatBytes || len(spots) > 0 {
		t.Errorf("the heartbeat's table ends at %d and lacks %d fields", at, len(spots))
	}
}

type formatField struct {
	off, size int
	name      string
}

// formatTables reads the rows "| off | size | name | ..." below the headings that
// begin with "## register" and "## heartbeat".
func formatTables(t *testing.T, page string) map[string][]formatField {
	t.Helper()
	tables := make(map[string][]formatField)
	section := ""
	for line := range strings.Lines(page) {
		if heading, ok := strings.CutPrefix(line, "## "); ok {
			section = strings.ToLower(strings.TrimRight(strings.Fields(heading)[len(strings.Fields(heading))-1], "s"))
			continue
		}
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if len(cells) < 3 {
			continue
		}
		off, err1 := strconv.Atoi(strings.TrimSpace(cells[0]))
		size, err2 := strconv.Atoi(strings.TrimSpace(cells[1]))
		if err1 == nil && err2 == nil {
			tables[section] = append(tables[section], formatField{off, size, strings.TrimSpace(cells[2])})
		}
	}
	return tables
}

func differs(a, b []byte) (first, last int) {
	first, last = -1, -1
	for i := range a {
		if a[i] != b[i] {
			if first < 0 {
				first = i
			}
			last = i
		}
	}
	return first, last
}
