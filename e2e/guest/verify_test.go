package guest_test

import (
	"bytes"
	"errors"
	"testing"

	"basalt/e2e/guest"
)

var ring16 = guest.Layout{Blocks: 16}

// diskAfter is a disk of 32 blocks after records 1..last.
func diskAfter(last uint64) []byte {
	d := make([]byte, 32*guest.RecordBytes)
	for seq := uint64(1); seq <= last; seq++ {
		put(d, ring16.BlockOf(seq), encoded(ring16, seq))
	}
	return d
}

func put(disk []byte, block uint64, content []byte) {
	copy(disk[block*guest.RecordBytes:], content)
}

func verify(t *testing.T, disk []byte, acked uint64) guest.Report {
	t.Helper()
	rep, err := guest.Verify(bytes.NewReader(disk), acked)
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

func TestWholeRingsAreGood(t *testing.T) {
	for last := range uint64(60) {
		rep := verify(t, diskAfter(last), last)
		if !rep.OK() || rep.Last != last || rep.Torn || last > 0 && (rep.Run != testRun || rep.Blocks != 16) {
			t.Errorf("after %d records: %+v", last, rep)
		}
	}
}

func TestAnyLostRecordIsSeen(t *testing.T) {
	const last = 40
	for seq := uint64(last - 14); seq <= last; seq++ {
		for name, content := range map[string][]byte{
			"zeros":          make([]byte, guest.RecordBytes),
			"the old record": encoded(ring16, seq-16),
			"half and half":  append(bytes.Clone(encoded(ring16, seq)[:2048]), encoded(ring16, seq-16)[2048:]...),
			"a stranger":     encoded(ring16, seq+1),
		} {
			d := diskAfter(last)
			put(d, ring16.BlockOf(seq), content)
			rep := verify(t, d, last)
			if rep.OK() || rep.BadCount != 1 || rep.Bad[0].Seq != seq || rep.Bad[0].Block != ring16.BlockOf(seq) {
				t.Errorf("record %d replaced by %s: %+v", seq, name, rep)
			}
		}
	}
}

// The host may have missed acknowledgements that the guest had: record 40 was
// begun only after 39 was safe.
func TestLossBehindTheNewestRecordIsSeenWithoutAnAcknowledgement(t *testing.T) {
	d := diskAfter(40)
	put(d, ring16.BlockOf(39), encoded(ring16, 39-16))
	if rep := verify(t, d, 30); rep.OK() || rep.Bad[0].Seq != 39 || rep.Last != 40 {
		t.Errorf("%+v", rep)
	}
}

func TestOnlyTheRecordInFlightMayBeTorn(t *testing.T) {
	torn := append(bytes.Clone(encoded(ring16, 41)[:512]), encoded(ring16, 41-16)[512:]...)
	d := diskAfter(40)
	put(d, ring16.BlockOf(41), torn)
	if rep := verify(t, d, 40); !rep.OK() || !rep.Torn || rep.Last != 40 {
		t.Errorf("in flight: %+v", rep)
	}
	stranger := diskAfter(40)
	put(stranger, ring16.BlockOf(41), encoded(ring16, 40))
	if rep := verify(t, stranger, 40); rep.OK() {
		t.Errorf("a misdirected record passes for a torn one: %+v", rep)
	}
	if rep := verify(t, d, 41); rep.OK() || rep.Bad[0].Seq != 25 && rep.Bad[0].Seq != 41 {
		t.Errorf("acknowledged: %+v", rep)
	}
}

func TestFirstRecordTornIsNoLoss(t *testing.T) {
	d := diskAfter(0)
	put(d, 0, encoded(ring16, 1)[:512])
	if rep := verify(t, d, 0); !rep.OK() {
		t.Errorf("%+v", rep)
	}
}

func TestRingIsFoundThoughItsFirstBlockIsTorn(t *testing.T) {
	d := diskAfter(16)
	put(d, 0, make([]byte, 512))
	if rep := verify(t, d, 16); !rep.OK() || !rep.Torn || rep.Last != 16 {
		t.Errorf("in flight: %+v", rep)
	}
	if rep := verify(t, d, 17); rep.OK() {
		t.Errorf("acknowledged: %+v", rep)
	}
}

func TestEmptyDisk(t *testing.T) {
	if rep := verify(t, diskAfter(0), 3); rep.OK() {
		t.Errorf("three records lost: %+v", rep)
	}
	if rep := verify(t, diskAfter(9), 12); rep.OK() || rep.BadCount != 3 {
		t.Errorf("three of twelve lost: %+v", rep)
	}
}

func TestBlocksNotYetWrittenMustBeZeros(t *testing.T) {
	d := diskAfter(4)
	put(d, ring16.BlockOf(9), []byte("another tenant's data"))
	if rep := verify(t, d, 4); rep.OK() || rep.Bad[0].Seq != 0 {
		t.Errorf("%+v", rep)
	}
}

func TestRecordsOfAnotherRunAreStrangers(t *testing.T) {
	d := diskAfter(16)
	other := make([]byte, guest.RecordBytes)
	guest.Record{Seq: 3, Run: guest.RunID{9}, Block: ring16.BlockOf(3), Blocks: 16}.EncodeInto(other)
	put(d, ring16.BlockOf(3), other)
	if rep := verify(t, d, 16); rep.OK() || rep.Bad[0].Seq != 3 {
		t.Errorf("%+v", rep)
	}
}

type failingReader struct{ err error }

func (r failingReader) ReadAt([]byte, int64) (int, error) { return 0, r.err }

func TestReadErrorIsNoVerdict(t *testing.T) {
	broken := errors.New("broken cable")
	if _, err := guest.Verify(failingReader{broken}, 1); !errors.Is(err, broken) {
		t.Errorf("error %v", err)
	}
	// A disk that is too short has lost records.
	if rep, err := guest.Verify(bytes.NewReader(diskAfter(16)[:8*guest.RecordBytes]), 16); err != nil || rep.OK() {
		t.Errorf("%+v, %v", rep, err)
	}
}
