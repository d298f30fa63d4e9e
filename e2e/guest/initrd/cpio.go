package initrd

import (
	"fmt"
	"io"
)

// File modes of cpio entries: the kind of the file above its permissions.
const (
	modeDir  = 0o040755
	modeExec = 0o100755
	modeFile = 0o100644
	modeChar = 0o020600
)

const cpioTrailer = "TRAILER!!!"

// archive writes the "newc" cpio format that the kernel unpacks as its first
// root (Documentation/driver-api/early-userspace/buffer-format.rst): a header of
// "070701" and 13 fields of 8 hex digits, the name with its NUL, the content;
// name and content are padded to 4 bytes. Times are zero, so equal inputs give
// equal archives.
type archive struct {
	w     io.Writer
	inode int
	err   error // the first failure; later calls do nothing
}

type entry struct {
	name         string
	mode         int
	major, minor int // of a device node
	content      []byte
}

func (a *archive) add(e entry) {
	if a.err != nil {
		return
	}
	if e.name != cpioTrailer {
		a.inode++
	}
	head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.inode, e.mode, 0, 0, 1, 0, len(e.content), 0, 0, e.major, e.minor, len(e.name)+1, 0, e.name)
	for _, part := range [][]byte{[]byte(head), e.content} {
		if _, err := a.w.Write(part); err != nil {
			a.err = err
			return
		}
		if pad := -len(part) & 3; pad > 0 {
			if _, err := a.w.Write(make([]byte, pad)); err != nil {
				a.err = err
				return
			}
		}
	}
}

func (a *archive) close() error {
	a.add(entry{name: cpioTrailer})
	return a.err
}
