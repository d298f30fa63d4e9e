package main

import "testing"

func TestSizesArePowersOf1024(t *testing.T) {
	for text, want := range map[string]int64{"512": 512, "64K": 64 << 10, "64k": 64 << 10, "10G": 10 << 30, "1T": 1 << 40, "0": 0, "62T": 62 << 40} {
		if got, err := parseSize(text); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "K", "-1", "1.5G", "10GB", "9999999999G", "1 G", "0x10"} {
		if got, err := parseSize(text); err == nil {
			t.Errorf("%q was taken for %d", text, got)
		}
	}
}

func TestBytesText(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 20 << 30: "20 GiB", 62 << 40: "62 TiB"} {
		if got := bytesText(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}
