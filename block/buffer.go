package block

import "unsafe"

// BufferAlign is the memory alignment, in bytes, of AlignedBuffer.
const BufferAlign = 4096

// AlignedBuffer returns n zeroed bytes whose address is a multiple of
// BufferAlign, as O_DIRECT transfers need.
func AlignedBuffer(n int) []byte {
	b := make([]byte, n+BufferAlign)
	skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (BufferAlign - 1))
	return b[skip : skip+n : skip+n]
}

// IsAligned reports whether b begins at a multiple of BufferAlign in memory.
func IsAligned(b []byte) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(b)))&(BufferAlign-1) == 0
}
