package fuzz_test

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"testing"
	"time"

	"basalt/block/unit"
	"basalt/vmfs"
)

// What a decoder of vmfs accepts, its encoder gives back byte for byte: a record has
// one form, and nothing hides in one. Checksums are made good first, or the fuzzer
// would never come past them.

var vmfsVolume = [16]byte{1, 2, 3}

const vmfsOff = 32 << 20

func FuzzVMFSSuperblock(f *testing.F) {
	sb := vmfs.Superblock{Volume: vmfsVolume, Sequence: 3, SizeBytes: 5 << 30, UnitBytes: 512, Lease: 8 * time.Second, MiddleGroup: 2, Created: time.Unix(1, 2), Label: "label"}
	seed := make([]byte, vmfs.SuperblockBytes)
	sb.Encode(seed, vmfs.SuperblockOff)
	f.Add(seed)
	f.Fuzz(func(t *testing.T, b []byte) {
		b = append(b, make([]byte, max(0, vmfs.SuperblockBytes-len(b)))...)[:vmfs.SuperblockBytes]
		binary.LittleEndian.PutUint32(b, crc32.Update(unit.Seed([16]byte{}, vmfs.SuperblockOff), unit.Castagnoli, b[4:]))
		sb, err := vmfs.DecodeSuperblock(b, vmfs.SuperblockOff)
		if err != nil {
			return
		}
		again := bytes.Clone(b)
		sb.Encode(again, vmfs.SuperblockOff)
		if !bytes.Equal(again, b) {
			t.Errorf("%+v is encoded in another way", sb)
		}
	})
}

func FuzzVMFSObjectHeader(f *testing.F) {
	h := vmfs.Header{Sequence: 4, LockGeneration: 5, Self: vmfs.Ref{Slot: 6, Incarnation: 7}, Kind: vmfs.KindFile, SizeBytes: 8, Created: time.Unix(1, 2), Modified: time.Unix(3, 4), Origin: vmfs.Ref{Slot: 9, Incarnation: 1}, OriginUUID: [16]byte{1}, Intents: []uint32{1, 2}, Payload: []byte("payload")}
	seed := make([]byte, vmfs.HeaderBytes)
	h.Encode(seed, vmfsVolume, vmfsOff)
	f.Add(seed[:600])
	f.Fuzz(func(t *testing.T, b []byte) {
		b = append(b, make([]byte, max(0, vmfs.HeaderBytes-len(b)))...)[:vmfs.HeaderBytes]
		binary.LittleEndian.PutUint32(b, crc32.Update(unit.Seed(vmfsVolume, vmfsOff), unit.Castagnoli, b[4:]))
		h, err := vmfs.DecodeHeader(b, vmfsVolume, vmfsOff)
		if err != nil {
			return
		}
		again := make([]byte, vmfs.HeaderBytes)
		h.Encode(again, vmfsVolume, vmfsOff)
		if !bytes.Equal(again, b) {
			t.Errorf("%+v is encoded in another way", h)
		}
	})
}

func vmfsUnit(b []byte) []byte {
	return append(b, make([]byte, max(0, 512-len(b)))...)[:512]
}

func FuzzVMFSLockUnit(f *testing.F) {
	p := unit.Place{Volume: vmfsVolume, OffBytes: vmfsOff, Kind: unit.KindLock}
	for _, l := range []vmfs.LockRecord{
		{Mode: vmfs.LockExclusive, Owner: vmfs.Holder{Slot: 1, Generation: 2}, Generation: 3, Since: time.UnixMilli(4)},
		{Mode: vmfs.LockShared, Shared: []vmfs.Holder{{Slot: 1, Generation: 2}, {Slot: 3, Generation: 4}}, Generation: 3, Want: vmfs.WantRelease, Waiter: vmfs.Holder{Slot: 5, Generation: 6}},
	} {
		f.Add(append(make([]byte, unit.HeadBytes), l.Encode(make([]byte, 512))...))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		b = vmfsUnit(b)
		l, err := vmfs.DecodeLock(p, b)
		if err != nil {
			return
		}
		if !bytes.Equal(l.Encode(b), b[unit.HeadBytes:]) {
			t.Errorf("%+v is encoded in another way", l)
		}
	})
}

func FuzzVMFSIdentityUnit(f *testing.F) {
	p := unit.Place{Volume: vmfsVolume, OffBytes: vmfsOff, Kind: unit.KindIdentity}
	for _, id := range []vmfs.Identity{
		{State: vmfs.StateLive, Kind: vmfs.KindDisk, Incarnation: 1, Parent: vmfs.Ref{Slot: 1, Incarnation: 1}, Name: "name", Count: 2},
		{State: vmfs.StateDying, Kind: vmfs.KindSnapshot, Incarnation: 4095, Pending: vmfs.Pending{Delta: -1, Child: vmfs.Ref{Slot: 9, Incarnation: 2}, Actor: vmfs.Holder{Slot: 1, Generation: 2}}, Holds: []vmfs.Holder{{Slot: 1, Generation: 2}}},
	} {
		f.Add(append(make([]byte, unit.HeadBytes), id.Encode(make([]byte, 512))...))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		b = vmfsUnit(b)
		id, err := vmfs.DecodeIdentity(p, b)
		if err != nil {
			return
		}
		if !bytes.Equal(id.Encode(b), b[unit.HeadBytes:]) {
			t.Errorf("%+v is encoded in another way", id)
		}
	})
}

func FuzzVMFSFolderPayload(f *testing.F) {
	inline := append([]byte{1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0}, make([]byte, 32)...)
	f.Add(append(inline, 2, 0, 0, 0, 1, 0, 1, 1, 'x'))
	blocks := append([]byte{2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 20}, make([]byte, 31)...)
	blocks = binary.LittleEndian.AppendUint64(blocks, uint64(vmfs.SlabOff(20)))
	f.Add(append(blocks, 1, 2, 3, 4, 9, 0, 1, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := vmfs.DecodeFolder(b)
		if err != nil {
			return
		}
		if !bytes.Equal(c.Encode(), b) {
			t.Errorf("%+v is encoded in another way", c)
		}
	})
}

func FuzzVMFSFilePayload(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 3, 0, 0, 0, 'a', 'b', 'c'})
	f.Add([]byte{2, 0, 0, 0, 1, 0, 0, 0, 20, 0, 0, 0, 2, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := vmfs.DecodeFile(b)
		if err != nil {
			return
		}
		if !bytes.Equal(c.Encode(), b) {
			t.Errorf("%+v is encoded in another way", c)
		}
	})
}
