package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// sizeUnits are the suffixes of sizes, powers of 1024.
const sizeUnits = "KMGTP"

// sizeFlag is a size on the command line: 512, 64K, 10G, 1T.
type sizeFlag int64

func (s *sizeFlag) String() string { return bytesText(int64(*s)) }

// Type names the flag's value in help texts.
func (s *sizeFlag) Type() string { return "SIZE" }

// Set parses a size.
func (s *sizeFlag) Set(text string) error {
	n, err := parseSize(text)
	*s = sizeFlag(n)
	return err
}

func parseSize(text string) (int64, error) {
	digits, shift := text, 0
	if n := len(text); n > 0 {
		if i := strings.IndexByte(sizeUnits, text[n-1]&^0x20); i >= 0 {
			digits, shift = text[:n-1], 10*(i+1)
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("%q is not a size; write 512, 64K, 10G or 1T", text)
	}
	return n << shift, nil
}

// bytesText writes a number of bytes for people.
func bytesText(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, unit := float64(n), -1
	for f >= 1024 && unit+1 < len(sizeUnits) {
		f /= 1024
		unit++
	}
	if f == math.Trunc(f) {
		return fmt.Sprintf("%.0f %ciB", f, sizeUnits[unit])
	}
	return fmt.Sprintf("%.1f %ciB", f, sizeUnits[unit])
}
