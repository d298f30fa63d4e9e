package kvmprobe

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"basalt/internal/clock"
)

func qemu(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("no qemu-system-x86_64")
	}
	return path
}

func TestGuestPassesOnATranslatedProcessor(t *testing.T) {
	if err := qemuStage(t.Context(), qemu(t), "tcg", "max"); err != nil {
		t.Fatal(err)
	}
}

func TestJudgeWantsEveryStepAndTheVerdict(t *testing.T) {
	if err := judge("1234567", verdictGood); err == nil || !strings.Contains(err.Error(), "step 8") {
		t.Errorf("a missing last step: %v", err)
	}
	for said, want := range map[string]string{
		"":          "stopped at step 1",
		"1234w":     "wrong result at step 5 of 8 (ring 3 and SYSCALL)",
		"123!":      "exception at step 4 of 8 (page fault)",
		"12345678":  `said "12345678"`,
		"21":        `said "21"`,
		"123456789": `said "123456789"`,
	} {
		if err := judge(said, 0); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("judge(%q) = %v; want …%s", said, err, want)
		}
	}
}

func TestProbeRefusesParavirtualizedKVMInTime(t *testing.T) {
	if unix.Access("/sys/module/kvm_pvm", unix.F_OK) != nil || unix.Access("/dev/kvm", unix.R_OK|unix.W_OK) != nil {
		t.Skip("this host's KVM is not the kind that hangs")
	}
	program := qemu(t)
	clk := clock.System{}
	began := clk.Now()
	v := Probe(t.Context(), program, "host")
	if v.OK || !strings.Contains(v.Reason, "step 5") {
		t.Errorf("verdict %+v; want a refusal at SYSCALL", v)
	}
	if took := clk.Now().Sub(began); took > 3*time.Second {
		t.Errorf("took %v", took)
	}
	// The second stage alone refuses too, a hang included.
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	for _, cpu := range []string{"host", "qemu64"} {
		if err := qemuStage(ctx, program, "kvm", cpu); err == nil {
			t.Errorf("the QEMU stage accepts -cpu %s", cpu)
		}
	}
}

func TestRawStageLeavesNoChild(t *testing.T) {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	defer f.Close()
	first, second := rawStage(f), rawStage(f)
	if (first == nil) != (second == nil) {
		t.Errorf("two runs disagree: %v, %v", first, second)
	}
	if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err != unix.ECHILD {
		t.Errorf("child %d is left (%v)", pid, err)
	}
}

func TestRawStageRefusesAFileThatIsNotKVM(t *testing.T) {
	f, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := rawStage(f); err == nil || !strings.Contains(err.Error(), "API version") {
		t.Errorf("rawStage(/dev/null) = %v", err)
	}
}

func TestPayloadIsBuiltFromItsSource(t *testing.T) {
	for _, tool := range []string{"as", "ld", "objcopy"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("no " + tool)
		}
	}
	out := filepath.Join(t.TempDir(), "probe.bin")
	if msg, err := exec.Command("payload/build.sh", out).CombinedOutput(); err != nil {
		t.Skipf("binutils here do not build it: %s", msg)
	}
	built, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(built, payload) {
		t.Error("payload/probe.bin is not what payload/probe.S assembles to")
	}
}
