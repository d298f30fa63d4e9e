package fuzz_test

import (
	"bytes"
	"testing"
	"time"

	"basalt/block"
	"basalt/lease"
)

func FuzzLeaseRegister(f *testing.F) {
	full := make([]byte, lease.RegisterBytes)
	lease.Register{
		Generation: 7, Phase: lease.Kill, BreakerSlot: 3, BreakerGeneration: 2, Server: true, Calls: 9,
		Fencers: block.FencePR | block.FenceOFD, Lease: 8 * time.Second, ClaimedAt: time.Unix(1, 2), Claim: 5,
		Address: "192.0.2.1", HostName: "host",
	}.EncodeInto(full)
	f.Add(full)
	f.Add(make([]byte, lease.RegisterBytes))
	f.Add(full[:100])
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := lease.DecodeRegister(b)
		if err != nil {
			return
		}
		again := bytes.Clone(b)
		r.EncodeInto(again)
		if !bytes.Equal(b, again) {
			t.Fatalf("%+v\nread from %x\nwritten as %x", r, b, again)
		}
	})
}

func FuzzLeaseHeartbeat(f *testing.F) {
	volume := [16]byte{1, 2, 3}
	b := make([]byte, 512)
	lease.Heartbeat{Generation: 1, Sequence: 2, Nonce: 3, WrittenAt: time.Unix(4, 5)}.Encode(b, volume, 8192)
	f.Add(b, int64(8192))
	f.Add(b[:lease.HeartbeatBytes-1], int64(0))
	f.Fuzz(func(t *testing.T, b []byte, offBytes int64) {
		h, err := lease.DecodeHeartbeat(b, volume, offBytes)
		if err != nil {
			return
		}
		again := make([]byte, len(b))
		h.Encode(again, volume, offBytes)
		if got, err := lease.DecodeHeartbeat(again, volume, offBytes); err != nil || got != h {
			t.Fatalf("%+v became %+v: %v", h, got, err)
		}
	})
}
