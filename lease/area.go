package lease

import (
	"context"
	"errors"
	"fmt"

	"basalt/block"
	"basalt/block/unit"
)

// MaxSlots is the largest number of slots: a slot's number fits a byte.
const MaxSlots = 256

// Area is where a volume keeps its heartbeats and registers.
type Area struct {
	Volume       [16]byte // seeds every checksum
	HeartbeatOff int64    // of slot 0, in bytes from the start of the device
	RegisterOff  int64    // of slot 0, in bytes from the start of the device
	StrideBytes  int64    // from one slot to the next, in both
	Slots        int      // 1 to MaxSlots
}

// LenBytes is the length of each of the area's two regions.
func (a Area) LenBytes() int64 { return a.StrideBytes * int64(a.Slots) }

func (a Area) validate(g block.Geometry) error {
	u := int64(g.UnitBytes)
	if a.Slots < 1 || a.Slots > MaxSlots {
		return fmt.Errorf("lease: %d slots, want 1 to %d", a.Slots, MaxSlots)
	}
	if u < RegisterBytes || a.StrideBytes < u || a.StrideBytes%u != 0 || a.HeartbeatOff%u != 0 || a.RegisterOff%u != 0 {
		return fmt.Errorf("lease: area at %d and %d with stride %d does not fit units of %d bytes: %w", a.HeartbeatOff, a.RegisterOff, a.StrideBytes, u, block.ErrMisaligned)
	}
	for _, off := range []int64{a.HeartbeatOff, a.RegisterOff} {
		if err := g.Check(off, a.LenBytes()); err != nil {
			return fmt.Errorf("lease: area: %w", err)
		}
	}
	if a.HeartbeatOff < a.RegisterOff+a.LenBytes() && a.RegisterOff < a.HeartbeatOff+a.LenBytes() {
		return fmt.Errorf("lease: heartbeats at %d and registers at %d overlap", a.HeartbeatOff, a.RegisterOff)
	}
	return nil
}

func (a Area) checkSlot(slot int) error {
	if slot < 0 || slot >= a.Slots {
		return fmt.Errorf("lease: slot %d of %d", slot, a.Slots)
	}
	return nil
}

func (a Area) place(slot int) unit.Place {
	return unit.Place{Volume: a.Volume, OffBytes: a.RegisterOff + int64(slot)*a.StrideBytes, Kind: unit.KindRegister}
}

func (a Area) beatOff(slot int) int64 { return a.HeartbeatOff + int64(slot)*a.StrideBytes }

// Format makes every slot FREE and never claimed. Nobody may use the area
// meanwhile. It is durable when Format returns nil. All of the area is written, so
// that a thinly provisioned device has its space from then on.
func Format(ctx context.Context, dev block.Device, area Area) error {
	g := dev.Geometry()
	if err := area.validate(g); err != nil {
		return err
	}
	beats, regs := block.AlignedBuffer(int(area.LenBytes())), block.AlignedBuffer(int(area.LenBytes()))
	for slot := range area.Slots {
		at := int64(slot) * area.StrideBytes
		Heartbeat{}.Encode(beats[at:at+int64(g.UnitBytes)], area.Volume, area.beatOff(slot))
		img := regs[at : at+int64(g.UnitBytes)]
		Register{}.EncodeInto(img)
		area.place(slot).Seal(img, unit.Head{Version: 1})
	}
	if err := dev.WriteAt(ctx, beats, area.HeartbeatOff); err != nil {
		return fmt.Errorf("lease: write heartbeats: %w", err)
	}
	if err := dev.WriteAt(ctx, regs, area.RegisterOff); err != nil {
		return fmt.Errorf("lease: write registers: %w", err)
	}
	if err := dev.Flush(ctx); err != nil {
		return fmt.Errorf("lease: flush: %w", err)
	}
	return nil
}

// SlotView is one slot as it was when it was read.
type SlotView struct {
	Slot      int
	Register  Register
	Heartbeat Heartbeat
	Beats     bool  // the heartbeat is of the register's generation
	Err       error // a damaged record; Register is then zero if it is the damaged one
}

// Holder is who has the slot, as a fencer needs to know it.
func (v SlotView) Holder() block.Holder { return holderOf(v.Slot, v.Register) }

// Observe reads all slots once. It changes nothing and needs no slot. One sample
// does not tell who is alive: compare the heartbeats of two.
func Observe(ctx context.Context, dev block.Device, area Area) ([]SlotView, error) {
	g := dev.Geometry()
	if err := area.validate(g); err != nil {
		return nil, err
	}
	regs, beats := block.AlignedBuffer(int(area.LenBytes())), block.AlignedBuffer(int(area.LenBytes()))
	// Heartbeats first: a generation claimed in between then shows no heartbeat,
	// never one that is not its own.
	if err := dev.ReadAt(ctx, beats, area.HeartbeatOff); err != nil {
		return nil, fmt.Errorf("lease: read heartbeats: %w", err)
	}
	if err := dev.ReadAt(ctx, regs, area.RegisterOff); err != nil {
		return nil, fmt.Errorf("lease: read registers: %w", err)
	}
	views := make([]SlotView, area.Slots)
	for slot := range views {
		at := int64(slot) * area.StrideBytes
		v := SlotView{Slot: slot}
		held, rerr := area.openRegister(slot, regs[at:at+int64(g.UnitBytes)])
		beat, berr := DecodeHeartbeat(beats[at:at+int64(g.UnitBytes)], area.Volume, area.beatOff(slot))
		v.Err = errors.Join(rerr, berr)
		v.Register, v.Heartbeat = held.reg, beat
		v.Beats = v.Err == nil && beat.Generation == held.reg.Generation
		views[slot] = v
	}
	return views, nil
}

// imaged is a register together with the whole unit it was read from, which a
// change of it compares with.
type imaged struct {
	img []byte
	reg Register
}

func (a Area) openRegister(slot int, img []byte) (imaged, error) {
	p := a.place(slot)
	if _, err := p.Open(img); err != nil {
		return imaged{}, err
	}
	reg, err := DecodeRegister(img)
	if err != nil {
		return imaged{}, &block.CorruptError{Object: fmt.Sprintf("register %d", slot), OffBytes: p.OffBytes, Reason: err.Error()}
	}
	return imaged{img: img, reg: reg}, nil
}

func (a Area) readRegister(ctx context.Context, dev block.Device, slot int) (imaged, error) {
	img, _, err := a.place(slot).Read(ctx, dev)
	if err != nil {
		return imaged{}, err
	}
	return a.openRegister(slot, img)
}

func (a Area) readHeartbeat(ctx context.Context, dev block.Device, slot int) (Heartbeat, error) {
	b := block.AlignedBuffer(dev.Geometry().UnitBytes)
	if err := dev.ReadAt(ctx, b, a.beatOff(slot)); err != nil {
		return Heartbeat{}, fmt.Errorf("read heartbeat of slot %d: %w", slot, err)
	}
	return DecodeHeartbeat(b, a.Volume, a.beatOff(slot))
}

// swapRegister changes a register by compare-and-write. The returned image is the
// register as it now is, if that is known: img is nil when it is not. Errors are
// unit.Swap's.
func (a Area) swapRegister(ctx context.Context, dev block.Device, slot int, old []byte, next Register, nonce func() uint64) (imaged, error) {
	body := make([]byte, len(old))
	copy(body, old)
	next.EncodeInto(body)
	res, err := a.place(slot).Swap(ctx, dev, old, body[unit.HeadBytes:], nonce)
	if res.Image == nil {
		return imaged{}, err
	}
	now, derr := a.openRegister(slot, res.Image)
	return now, errors.Join(err, derr)
}
