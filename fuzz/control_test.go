package fuzz_test

import (
	"encoding/json"
	"testing"

	"basalt/store"
)

// FuzzControlRequest: what is accepted comes back as it was.
func FuzzControlRequest(f *testing.F) {
	f.Add([]byte(`{"verb":"disk.info","path":"/vm1/d0"}`))
	f.Add([]byte(`{"verb":"disk.clone","path":"/a","name":"s","to":"/b"}`))
	f.Add([]byte(`{"verb":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := store.DecodeRequest(b)
		if err != nil {
			return
		}
		text, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := store.DecodeRequest(text); err != nil || again != r {
			t.Fatalf("%+v came back as %+v, %v", r, again, err)
		}
	})
}
