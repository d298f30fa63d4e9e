package filedev

import (
	"math/bits"
	"sync"
	"unsafe"

	"basalt/block"
)

// Bounce buffers come in powers of two; longer transfers go piece by piece.
const (
	minBounceShift = 12 // 4 KiB
	maxBounceShift = 20 // 1 MiB
	maxBounceBytes = 1 << maxBounceShift
)

// bouncePool lends aligned memory to transfers whose own is not.
type bouncePool struct {
	classes [maxBounceShift - minBounceShift + 1]sync.Pool // of *[]byte
}

func bounceClass(n int) int {
	return max(0, bits.Len(uint(n-1))-minBounceShift)
}

// get returns n bytes of arbitrary content, n at most maxBounceBytes, and the
// handle by which to put them back.
func (p *bouncePool) get(n int) ([]byte, *[]byte) {
	class := bounceClass(n)
	if b, ok := p.classes[class].Get().(*[]byte); ok {
		return (*b)[:n], b
	}
	b := block.AlignedBuffer(1 << (class + minBounceShift))
	return b[:n], &b
}

func (p *bouncePool) put(b *[]byte) { p.classes[bounceClass(len(*b))].Put(b) }

// fits tells whether the device can transfer p in place.
func (d *Device) fits(p []byte) bool {
	return !d.direct || uintptr(unsafe.Pointer(unsafe.SliceData(p)))&(d.memAlign-1) == 0
}
