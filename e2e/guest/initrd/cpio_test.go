package initrd

import (
	"bytes"
	"os/exec"
	"strings"
	"testing"
)

func TestArchiveIsReadByCpio(t *testing.T) {
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("no cpio")
	}
	var buf bytes.Buffer
	a := &archive{w: &buf}
	a.add(entry{name: "dev", mode: modeDir})
	a.add(entry{name: "dev/console", mode: modeChar, major: 5, minor: 1})
	a.add(entry{name: "init", mode: modeExec, content: []byte("12345")})
	a.add(entry{name: "empty", mode: modeFile})
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("cpio", "-tvn", "--quiet")
	cmd.Stdin = bytes.NewReader(buf.Bytes())
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var got []string
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		got = append(got, f[0]+" "+f[len(f)-1])
	}
	want := "drwxr-xr-x dev|crw------- dev/console|-rwxr-xr-x init|-rw-r--r-- empty"
	if strings.Join(got, "|") != want || !strings.Contains(string(out), "5,   1") {
		t.Errorf("cpio lists:\n%s", out)
	}
	cmd = exec.Command("cpio", "-i", "--quiet", "--to-stdout", "init")
	cmd.Stdin = bytes.NewReader(buf.Bytes())
	if out, err := cmd.Output(); err != nil || string(out) != "12345" {
		t.Errorf("content %q, %v", out, err)
	}
}
