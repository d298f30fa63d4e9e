package fuzz_test

import (
	"bytes"
	"io"
	"reflect"
	"testing"
	"testing/iotest"

	"basalt/hypervisor/qmp"
)

// FuzzQMP feeds a monitor's stream to the decoder: every accepted message is of
// one kind, and how the bytes arrive does not change what they mean.
func FuzzQMP(f *testing.F) {
	for _, seed := range []string{
		`{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}` + "\r\n" + `{"return": {}, "id": 1}`,
		`{"timestamp": {"seconds": 1432121972, "microseconds": 744001}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}`,
		`{"error": {"class": "CommandNotFound", "desc": "x"}, "id": 18446744073709551615}`,
		`{"return": null, "id": 2}{"return": [[[{}]]], "id": 3}`,
		`{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "STOP"}`,
		`{"return": {}, "error": {}}`,
		`{"id": 0, "return": 1}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		whole := decodeQMP(t, bytes.NewReader(b), len(b))
		split := decodeQMP(t, iotest.OneByteReader(bytes.NewReader(b)), len(b))
		if !reflect.DeepEqual(whole, split) {
			t.Errorf("whole: %+v\nin single bytes: %+v", whole, split)
		}
	})
}

func decodeQMP(t *testing.T, r io.Reader, lenBytes int) []qmp.Message {
	d := qmp.NewDecoder(r)
	var all []qmp.Message
	for {
		m, err := d.Next()
		if err != nil {
			return all
		}
		kinds := 0
		for _, set := range []bool{m.Greeting != nil, m.Event != nil, m.Return != nil, m.Refusal != nil} {
			if set {
				kinds++
			}
		}
		if kinds != 1 {
			t.Fatalf("message of %d kinds: %+v", kinds, m)
		}
		if all = append(all, m); len(all) > lenBytes {
			t.Fatal("more messages than bytes")
		}
	}
}
