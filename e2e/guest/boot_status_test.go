//go:build e2e

package guest_test

import "strings"

// statusField returns a field of /proc/PID/status with single spaces.
func statusField(status, key string) string {
	for line := range strings.Lines(status) {
		if rest, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.Join(strings.Fields(rest), " ")
		}
	}
	return "absent"
}
