package nbd_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"basalt/nbd"
)

// run runs a program of the machine, or skips the test when it is absent.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("no %s on this machine", name)
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Dir = t.TempDir() // fio leaves a state file behind
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, stderr.Bytes())
	}
	return string(out)
}

func uri(path string) string { return "nbd+unix:///d?socket=" + path }

func TestNbdinfoSeesTheExport(t *testing.T) {
	t.Parallel()
	d := newDisk(8 << 20)
	d.info.MinBlock, d.info.FastZeroes, d.info.Description = 4096, true, "a disk"
	d.extents = []nbd.Extent{{LenBytes: 1 << 20}, {LenBytes: 7 << 20, Hole: true, Zero: true}}
	exports := one(d)
	exports.byName["other"] = newDisk(512)
	path := listen(t, exports, nbd.Options{})

	type export struct {
		Name        string   `json:"export-name"`
		Description string   `json:"description"`
		Size        int64    `json:"export-size"`
		Contexts    []string `json:"contexts"`
		MultiConn   bool     `json:"can_multi_conn"`
		FUA         bool     `json:"can_fua"`
		Flush       bool     `json:"can_flush"`
		Trim        bool     `json:"can_trim"`
		Zero        bool     `json:"can_zero"`
		FastZero    bool     `json:"can_fast_zero"`
		DF          bool     `json:"can_df"`
		ReadOnly    bool     `json:"is_read_only"`
		Minimum     int      `json:"block_size_minimum"`
		Preferred   int      `json:"block_size_preferred"`
		Maximum     int      `json:"block_size_maximum"`
	}
	var info struct {
		Protocol   string   `json:"protocol"`
		Structured bool     `json:"structured"`
		Exports    []export `json:"exports"`
	}
	if err := json.Unmarshal([]byte(run(t, "nbdinfo", "--json", uri(path))), &info); err != nil {
		t.Fatal(err)
	}
	want := export{"d", "a disk", 8 << 20, []string{"base:allocation"}, true, true, true, true, true, true, true, false, 4096, 4096, 32 << 20}
	if len(info.Exports) != 1 || info.Protocol != "newstyle-fixed" || !info.Structured {
		t.Fatalf("got %+v", info)
	}
	got := info.Exports[0]
	if !equalJSON(t, got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}

	out := run(t, "nbdinfo", "--map", uri(path))
	if f := strings.Fields(out); strings.Join(f, " ") != "0 1048576 0 data 1048576 7340032 3 hole,zero" {
		t.Errorf("map: %q", out)
	}
	if out := run(t, "nbdinfo", "--list", "nbd+unix://?socket="+path); !strings.Contains(out, `"d"`) || !strings.Contains(out, `"other"`) {
		t.Errorf("list: %s", out)
	}
}

func equalJSON(t *testing.T, a, b any) bool {
	t.Helper()
	x, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Equal(x, y)
}

// image writes random bytes with a hole in the middle to a file.
func image(t *testing.T, sizeBytes int) (path string, data []byte) {
	t.Helper()
	data = randomBytes(sizeBytes)
	clear(data[sizeBytes/4 : sizeBytes/2])
	path = filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, data
}

func TestNbdcopyCopiesBothWays(t *testing.T) {
	t.Parallel()
	const size = 32 << 20
	d := newDisk(size)
	d.info.MinBlock = 512
	path := listen(t, one(d), nbd.Options{})
	file, want := image(t, size)
	run(t, "nbdcopy", "--flush", file, uri(path))
	d.look(func() {
		if !bytes.Equal(d.durable, want) {
			t.Error("the export does not hold the file, durably")
		}
		if d.opens < 2 {
			t.Errorf("%d connections: multi-conn was not used", d.opens)
		}
	})
	back := filepath.Join(t.TempDir(), "back")
	run(t, "nbdcopy", uri(path), back)
	if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the copy differs (%v)", err)
	}
}

func TestQemuImgConvertsAndCompares(t *testing.T) {
	t.Parallel()
	const size = 16 << 20
	d := newDisk(size)
	d.info.MinBlock, d.info.FastZeroes = 4096, true
	path := listen(t, one(d), nbd.Options{})
	file, want := image(t, size)
	run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", file, uri(path))
	d.look(func() {
		if !bytes.Equal(d.durable, want) {
			t.Error("the export does not hold the file, durably")
		}
	})
	out := run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", file, uri(path))
	if !strings.Contains(out, "identical") {
		t.Errorf("compare: %s", out)
	}
}

// QEMU does its own read-modify-write to keep to the export's blocks.
func TestQemuIoWritesZeroesAndTrims(t *testing.T) {
	t.Parallel()
	d := newDisk(1 << 20)
	d.info.MinBlock, d.info.FastZeroes = 4096, true
	path := listen(t, one(d), nbd.Options{})
	run(t, "qemu-io", "-f", "raw", "-d", "unmap", uri(path),
		"-c", "write -P 1 0 64k",
		"-c", "write -f -P 2 512 1k",
		"-c", "write -z 16k 8k",
		"-c", "write -z -u 32k 4k",
		"-c", "discard 40k 4k",
		"-c", "read -P 2 512 1k",
		"-c", "read -P 0 16k 8k",
		"-c", "flush")
	want := make([]byte, 64<<10)
	for i := range want {
		want[i] = 1
	}
	copy(want[512:], bytes.Repeat([]byte{2}, 1024))
	clear(want[16<<10 : 24<<10])
	clear(want[32<<10 : 36<<10])
	clear(want[40<<10 : 44<<10])
	d.look(func() {
		if !bytes.Equal(d.durable[:64<<10], want) {
			t.Error("the export holds other bytes")
		}
	})
	ops := strings.Join(d.did(), ",")
	for _, op := range []string{"write fua", "trim", "NoHole:true", "NoHole:false"} {
		if !strings.Contains(ops, op) {
			t.Errorf("no %q among %s", op, ops)
		}
	}
}

func TestFioVerifiesRandomWrites(t *testing.T) {
	t.Parallel()
	d := newDisk(16 << 20)
	path := listen(t, one(d), nbd.Options{})
	if out := run(t, "fio", "--enghelp"); !strings.Contains(out, "\tnbd") {
		t.Skip("this fio has no nbd engine")
	}
	out := run(t, "fio", "--name=v", "--ioengine=nbd", "--uri="+uri(path), "--rw=randwrite", "--bsrange=512-64k",
		"--size=16m", "--iodepth=32", "--verify=crc32c", "--verify_fatal=1", "--randseed=7", "--output-format=json")
	var result struct {
		Jobs []struct {
			Error int
			Read  struct {
				TotalIOs int `json:"total_ios"`
			}
		}
	}
	// A line of fio's engine precedes the JSON.
	if err := json.Unmarshal([]byte(out[max(0, strings.Index(out, "{")):]), &result); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	if j := result.Jobs[0]; j.Error != 0 || j.Read.TotalIOs == 0 {
		t.Errorf("error %d after %d verifying reads", j.Error, j.Read.TotalIOs)
	}
}
