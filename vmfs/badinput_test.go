package vmfs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"log/slog"
	"strings"
	"testing"

	"basalt/block"
	"basalt/block/faultdev"
	"basalt/block/simdev"
	"basalt/block/unit"
	"basalt/internal/clock"
	"basalt/vmfs"
)

const volumeBytes = 128 << 20

// superblockCopies are the places of a volume of volumeBytes.
var superblockCopies = [3]int64{vmfs.SuperblockOff, vmfs.GroupsOff + vmfs.MiddleOff, volumeBytes - 1<<20}

func tryMount(t *testing.T, lun *simdev.LUN, wrap func(block.Device) block.Device) error {
	t.Helper()
	h := lun.Host("try")
	v, err := vmfs.Mount(t.Context(), wrap(h), h, clock.System{}, slog.New(slog.DiscardHandler), vmfs.MountOptions{HostName: "try", HostID: [16]byte{1}})
	if err != nil {
		return err
	}
	return v.Close(t.Context())
}

func plain(d block.Device) block.Device { return d }

func overwrite(t *testing.T, lun *simdev.LUN, off int64, b []byte) {
	t.Helper()
	if err := lun.Host("vandal").WriteFUA(t.Context(), b, off); err != nil {
		t.Fatal(err)
	}
}

func worst(t *testing.T, lun *simdev.LUN) (vmfs.Severity, string) {
	t.Helper()
	v, err := vmfs.View(t.Context(), lun.Host("check"), clock.System{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := v.Check(t.Context(), diskSlabs)
	if err != nil {
		t.Fatal(err)
	}
	var what []string
	for _, f := range r.Findings {
		what = append(what, f.Where+": "+f.What)
	}
	return r.Worst(), strings.Join(what, "; ")
}

func TestVolumeMountsWithAnyOneSuperblock(t *testing.T) {
	base := newLUN(t, volumeBytes, 512)
	for broken := range 1 << 3 {
		lun := base.Clone()
		for i, off := range superblockCopies {
			if broken&(1<<i) != 0 {
				overwrite(t, lun, off, bytes.Repeat([]byte{0xee}, 4096))
			}
		}
		err := tryMount(t, lun, plain)
		if broken == 7 {
			if !errors.Is(err, vmfs.ErrNotVolume) {
				t.Errorf("no copy is left: %v", err)
			}
			continue
		}
		if err != nil {
			t.Errorf("copies %03b are broken: %v", broken, err)
			continue
		}
		if s, what := worst(t, lun); (s == vmfs.Damage) != (broken != 0) {
			t.Errorf("copies %03b are broken, check says %v: %s", broken, s, what)
		}
	}
}

// editSuperblock changes all copies and gives them good checksums.
func editSuperblock(t *testing.T, lun *simdev.LUN, edit func(b []byte)) {
	t.Helper()
	dev := lun.Host("editor")
	for _, off := range superblockCopies {
		b := make([]byte, vmfs.SuperblockBytes)
		if err := dev.ReadAt(t.Context(), b, off); err != nil {
			t.Fatal(err)
		}
		edit(b)
		binary.LittleEndian.PutUint32(b, crc32.Update(unit.Seed([16]byte{}, off), unit.Castagnoli, b[4:]))
		overwrite(t, lun, off, b)
	}
}

func TestUnusableSuperblockIsRefused(t *testing.T) {
	base := newLUN(t, volumeBytes, 512)
	le := binary.LittleEndian
	var damaged *block.CorruptError
	for name, c := range map[string]struct {
		edit    func(b []byte)
		want    error // nil: damage
		viewing bool  // can still be viewed
	}{
		"newer version":           {edit: func(b []byte) { b[4] = 2 }, want: vmfs.ErrFormat},
		"version 0":               {edit: func(b []byte) { b[4] = 0 }},
		"unknown incompat bit":    {edit: func(b []byte) { b[72] = 2 }, want: vmfs.ErrFormat},
		"unknown ro-compat bit":   {edit: func(b []byte) { b[64] = 1 }, want: vmfs.ErrFormat, viewing: true},
		"other magic":             {edit: func(b []byte) { b[8] = 'X' }, want: vmfs.ErrNotVolume},
		"size of nothing":         {edit: func(b []byte) { le.PutUint64(b[40:], 0) }},
		"negative size":           {edit: func(b []byte) { b[47] = 0x80 }},
		"endless size":            {edit: func(b []byte) { le.PutUint64(b[40:], 1<<60) }},
		"larger than the device":  {edit: func(b []byte) { le.PutUint64(b[40:], 256<<20) }, want: vmfs.ErrTruncated},
		"no volume id":            {edit: func(b []byte) { clear(b[16:32]) }},
		"unit of 1 byte":          {edit: func(b []byte) { le.PutUint32(b[48:], 1) }},
		"units not the device's":  {edit: func(b []byte) { le.PutUint32(b[48:], 4096) }, want: vmfs.ErrFormat, viewing: true},
		"no lease":                {edit: func(b []byte) { clear(b[52:56]) }},
		"middle past the end":     {edit: func(b []byte) { b[80] = 9 }},
		"label past its place":    {edit: func(b []byte) { b[96] = 65 }},
		"label longer than said":  {edit: func(b []byte) { b[120] = 'x' }},
		"unknown compatible bit ": {edit: func(b []byte) { b[56] = 1 }, want: errors.ErrUnsupported, viewing: true},
	} {
		lun := base.Clone()
		editSuperblock(t, lun, c.edit)
		err := tryMount(t, lun, plain)
		switch {
		case c.want == errors.ErrUnsupported:
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		case c.want != nil && !errors.Is(err, c.want), c.want == nil && !errors.As(err, &damaged):
			t.Errorf("%s: mount: %v", name, err)
		}
		if _, err := vmfs.View(t.Context(), lun.Host("view"), clock.System{}); (err == nil) != c.viewing {
			t.Errorf("%s: view: %v", name, err)
		}
	}
}

func TestTruncatedLUNIsRefused(t *testing.T) {
	lun := newLUN(t, volumeBytes, 512)
	first := make([]byte, 4096)
	if err := lun.Host("read").ReadAt(t.Context(), first, vmfs.SuperblockOff); err != nil {
		t.Fatal(err)
	}
	small := simdev.New(simdev.Options{SizeBytes: volumeBytes / 2, LogicalBytes: 512})
	overwrite(t, small, vmfs.SuperblockOff, first)
	if err := tryMount(t, small, plain); !errors.Is(err, vmfs.ErrTruncated) {
		t.Error(err)
	}
}

func TestLyingDeviceIsRefused(t *testing.T) {
	base := newLUN(t, volumeBytes, 512)
	for name, rule := range map[string]faultdev.Rule{
		"writes without comparing":        {Ops: faultdev.CAW, Effect: faultdev.BlindCAW},
		"reports success, writes nothing": {Ops: faultdev.CAW, Effect: faultdev.Lost},
		"right compare without effect":    {Ops: faultdev.CAW, Effect: faultdev.Lost, Nth: 2},
		"always miscompares":              {Ops: faultdev.CAW, Effect: faultdev.FailBefore, Err: block.ErrMiscompare},
	} {
		err := tryMount(t, base.Clone(), func(d block.Device) block.Device { return faultdev.New(d, rule) })
		if !errors.Is(err, vmfs.ErrLyingDevice) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A record of the wrong place, kind or volume, a torn one, and one of zeros are
// damage: check says so, and nothing takes them for free.
func TestBadRecordsAreDamage(t *testing.T) {
	base := newLUN(t, volumeBytes, 512)
	var file, folder vmfs.Info
	func() {
		v := mount(t, base, "a")
		for _, err := range []error{put(t.Context(), v, "/file", 2<<20, 1), v.Mkdir(t.Context(), "/folder"), put(t.Context(), v, "/folder/in", 10, 1)} {
			if err != nil {
				t.Fatal(err)
			}
		}
		file, _ = v.Lookup(t.Context(), "/file")
		folder, _ = v.Lookup(t.Context(), "/folder")
		if err := v.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}()
	if s, what := worst(t, base); s != vmfs.Note {
		t.Fatal(what)
	}
	fileAt, folderAt := objectAt(file.Ref.Slot), objectAt(folder.Ref.Slot)
	read := func(off int64, n int) []byte {
		b := make([]byte, n)
		if err := base.Host("read").ReadAt(t.Context(), b, off); err != nil {
			t.Fatal(err)
		}
		return b
	}
	foreign := read(vmfs.GroupsOff, 512)
	unit.Place{Volume: [16]byte{9}, OffBytes: vmfs.GroupsOff, Kind: unit.KindOwnerTable}.Seal(foreign, unit.Head{Version: 1})
	flipped := read(fileAt+identityIn, 512)
	flipped[300] ^= 1
	for name, c := range map[string]struct {
		off int64
		b   []byte
	}{
		"zeroed owner table unit":       {vmfs.GroupsOff, make([]byte, 512)},
		"foreign owner table unit":      {vmfs.GroupsOff, foreign},
		"misdirected owner table unit":  {vmfs.GroupsOff, read(vmfs.GroupsOff+512, 512)},
		"zeroed lock of a free slot":    {objectAt(50), make([]byte, 512)},
		"identity with a flipped bit":   {fileAt + identityIn, flipped},
		"lock where an identity was":    {fileAt + identityIn, read(fileAt, 512)},
		"both headers zeroed":           {fileAt + headerAIn, make([]byte, 2*vmfs.HeaderBytes)},
		"folder with another's headers": {folderAt + headerAIn, read(fileAt+headerAIn, 2*vmfs.HeaderBytes)},
		"zeroed register":               {vmfs.RegisterOff, make([]byte, 512)},
	} {
		lun := base.Clone()
		overwrite(t, lun, c.off, c.b)
		if s, what := worst(t, lun); s != vmfs.Damage {
			t.Errorf("%s: check says %v: %s", name, s, what)
		}
		v := mount(t, lun, "b")
		// What is not hit still works, and creations go elsewhere.
		err := put(t.Context(), v, "/new", 100, 1)
		var damaged *block.CorruptError
		if err != nil && !errors.As(err, &damaged) {
			t.Errorf("%s: put: %v", name, err)
		}
		if name == "zeroed lock of a free slot" && err != nil {
			t.Errorf("%s: put: %v", name, err)
		}
		if err := v.Close(t.Context()); err != nil {
			t.Errorf("%s: close: %v", name, err)
		}
	}
	// The torn copy of a header is no damage: the other one serves.
	lun := base.Clone()
	overwrite(t, lun, folderAt+headerAIn+4096, make([]byte, 4096))
	if s, what := worst(t, lun); s == vmfs.Damage && !strings.Contains(what, "in no folder") {
		t.Errorf("one header copy is torn, check says: %s", what)
	}
}

// putHeader gives an object a header of a hostile payload, with a good checksum.
func putHeader(t *testing.T, lun *simdev.LUN, info vmfs.Info, sizeBytes int64, payload []byte) {
	t.Helper()
	h := vmfs.Header{Sequence: 1 << 40, LockGeneration: 1, Self: info.Ref, Kind: info.Kind, SizeBytes: sizeBytes, Payload: payload}
	off := objectAt(info.Ref.Slot) + headerAIn
	b := make([]byte, vmfs.HeaderBytes)
	h.Encode(b, testVolume, off)
	overwrite(t, lun, off, b)
}

func TestHostilePayloadsAreDamage(t *testing.T) {
	base := newLUN(t, volumeBytes, 512)
	v := mount(t, base, "a")
	for _, err := range []error{v.Mkdir(t.Context(), "/folder"), put(t.Context(), v, "/file", 10, 1)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	folder, _ := v.Lookup(t.Context(), "/folder")
	file, _ := v.Lookup(t.Context(), "/file")
	if err := v.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	head := func(form byte, entries, slabs, blocks, inline int, rest ...byte) []byte {
		b := make([]byte, 48)
		b[0] = form
		le.PutUint32(b[4:], uint32(entries))
		le.PutUint16(b[8:], uint16(slabs))
		le.PutUint16(b[10:], uint16(blocks))
		le.PutUint32(b[12:], uint32(inline))
		return append(b, rest...)
	}
	entry := func(slot uint32, name string) []byte {
		b := le.AppendUint32(nil, slot)
		b = le.AppendUint16(b, 1)
		return append(append(b, 1, byte(len(name))), name...)
	}
	inline := func(e []byte) []byte { return head(1, 1, 0, 0, len(e), e...) }
	pointer := func(off uint64) []byte {
		return head(2, 1, 1, 1, 0, append(le.AppendUint64(nil, off), make([]byte, 8)...)...)
	}
	far := head(1, 0, 1, 0, 0)
	le.PutUint32(far[16:], 1<<30)
	for name, payload := range map[string][]byte{
		"empty":                   {},
		"unknown form":            head(3, 0, 0, 0, 0),
		"more entries than bytes": head(1, 10000, 0, 0, 0),
		"too many entries":        head(1, 1<<30, 0, 0, 0),
		"too many slabs":          head(1, 0, 9, 0, 0),
		"slab past the end":       far,
		"bytes after the entries": head(1, 0, 0, 0, 0, 1),
		"name of ..":              inline(entry(2, "..")),
		"name with a slash":       inline(entry(2, "a/b")),
		"empty name":              inline(entry(2, "")),
		"slot out of range":       inline(entry(1<<20, "x")),
		"block in no slab":        pointer(vmfs.GroupsOff + 100<<20),
		"block at 2^63":           pointer(1 << 63),
		"blocks cut off":          head(2, 0, 0, 5, 0),
		"block of the table":      pointer(vmfs.GroupsOff),
	} {
		lun := base.Clone()
		putHeader(t, lun, folder, 0, payload)
		if s, what := worst(t, lun); s != vmfs.Damage {
			t.Errorf("folder, %s: check says %v: %s", name, s, what)
		}
		v := mount(t, lun, "b")
		var damaged *block.CorruptError
		if err := v.Mkdir(t.Context(), "/folder/x"); !errors.As(err, &damaged) {
			t.Errorf("folder, %s: mkdir in it: %v", name, err)
		}
		if err := v.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
	runs := func(n uint32, runs ...uint32) []byte {
		b := []byte{2, 0, 0, 0}
		b = le.AppendUint32(b, n)
		for _, r := range runs {
			b = le.AppendUint32(b, r)
		}
		return b
	}
	for name, c := range map[string]struct {
		size    int64
		payload []byte
	}{
		"empty":                 {0, nil},
		"longer than it is":     {11, append([]byte{1, 0, 0, 0, 10, 0, 0, 0}, make([]byte, 10)...)},
		"runs cut off":          {0, runs(4, 20, 1)},
		"endless run":           {1 << 40, runs(1, 20, 1<<32-1)},
		"run past the end":      {1, runs(1, 5000, 1)},
		"larger than its slabs": {3 << 20, runs(1, 20, 2)},
		"slab of nobody":        {1 << 20, runs(1, 20, 1)},
		"the table's own slab":  {1 << 20, runs(1, 1, 1)},
	} {
		lun := base.Clone()
		putHeader(t, lun, file, c.size, c.payload)
		if s, what := worst(t, lun); s != vmfs.Damage {
			t.Errorf("file, %s: check says %v: %s", name, s, what)
		}
		v := mount(t, lun, "b")
		// It may be read or refused, but never frees or reads what is not there.
		if err := v.Get(t.Context(), "/file", io.Discard, nil); err != nil {
			var damaged *block.CorruptError
			if !errors.As(err, &damaged) {
				t.Errorf("file, %s: get: %v", name, err)
			}
		}
		if err := v.Remove(t.Context(), "/file"); err != nil {
			t.Errorf("file, %s: remove: %v", name, err)
		}
		if err := v.Close(t.Context()); err != nil {
			t.Error(err)
		}
		if s, what := worst(t, lun); s == vmfs.Damage {
			t.Errorf("file, %s: removed, check says %s", name, what)
		}
	}
}

func TestHostileNamesAreRefused(t *testing.T) {
	lun := newLUN(t, volumeBytes, 512)
	v := mount(t, lun, "a")
	if err := put(t.Context(), v, "/good", 10, 1); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "/", ".", "..", "/a/../b", "//", "/a@b", "/a:b", "/a\x00b", "/a\nb", "/\xff", "/" + strings.Repeat("x", 256), "/\u0085"} {
		for what, err := range map[string]error{
			"mkdir": v.Mkdir(t.Context(), name), "put": put(t.Context(), v, name, 1, 1),
			"rename": v.Rename(t.Context(), "/good", name), "remove": v.Remove(t.Context(), name),
		} {
			if !errors.Is(err, vmfs.ErrName) {
				t.Errorf("%s %q: %v", what, name, err)
			}
		}
	}
	if err := v.Mkdir(t.Context(), "/"+strings.Repeat("x", 255)); err != nil {
		t.Error(err)
	}
	deep := strings.Repeat("/d", 64)
	if err := v.Mkdir(t.Context(), deep+"/d"); !errors.Is(err, vmfs.ErrName) {
		t.Errorf("65 folders deep: %v", err)
	}
	if err := v.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}
