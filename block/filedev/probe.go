package filedev

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"basalt/block"
)

// zfsMagic is f_type of ZFS on Linux, which is not in the kernel's magic.h.
const zfsMagic = 0x2fc12fc1

// isLocalFilesystem tells whether only one kernel can have files of the
// filesystem open, so that an OFD lock reaches every writer. What is not known is
// not local: a network lock can be lost with its server, and a stacked filesystem
// may lock another inode than it writes.
func isLocalFilesystem(magic uint32) bool {
	switch magic {
	case unix.EXT4_SUPER_MAGIC, // ext2 and ext3 have the same
		unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.F2FS_SUPER_MAGIC,
		unix.BCACHEFS_SUPER_MAGIC, unix.TMPFS_MAGIC, zfsMagic:
		return true
	}
	return false
}

// probe fills in the geometry and switches direct I/O on.
func (d *Device) probe() error {
	dio, err := d.probeAlignment()
	if err != nil {
		return err
	}
	logical := dio.offset
	if d.opts.LogicalBytes != 0 {
		logical = d.opts.LogicalBytes
	}
	if !d.opts.Buffered && dio.works {
		d.direct, err = setDirect(d.fd)
		if err != nil {
			return err
		}
	}
	if d.direct && logical < dio.offset {
		return fmt.Errorf("logical blocks of %d bytes under direct I/O of %d: %w", logical, dio.offset, block.ErrNotSupported)
	}
	d.memAlign = uintptr(dio.memory)
	d.geo = block.Geometry{LogicalBytes: logical, UnitBytes: logical}

	size, err := sizeOf(d.fd, logical)
	if err != nil {
		return err
	}
	if size == 0 || size > maxFileBytes {
		return fmt.Errorf("size of %d bytes cannot be a device: %w", size, block.ErrNotSupported)
	}
	d.size.Store(size)
	if d.blockDev {
		return d.probeDiscardBlock()
	}
	return d.probeFile()
}

// alignment is what direct I/O needs.
type alignment struct {
	works          bool
	offset, memory int // bytes; offset is 512 or 4096
}

func (d *Device) probeAlignment() (alignment, error) {
	if d.blockDev {
		n, err := unix.IoctlGetInt(d.fd, unix.BLKSSZGET)
		if err != nil {
			return alignment{}, fmt.Errorf("logical block size: %w", err)
		}
		if n != 512 && n != 4096 {
			return alignment{}, fmt.Errorf("logical blocks of %d bytes: %w", n, block.ErrNotSupported)
		}
		return alignment{works: true, offset: n, memory: n}, nil
	}
	// A filesystem that does not report its needs is served with blocks of 4096,
	// which all of them accept.
	unknown := alignment{works: true, offset: 4096, memory: 4096}
	var st unix.Statx_t
	err := unix.Statx(d.fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) { // before 4.11; old seccomp filters
		return unknown, nil
	}
	if err != nil {
		return alignment{}, err
	}
	if st.Mask&unix.STATX_DIOALIGN == 0 {
		return unknown, nil
	}
	offset, memory := int(st.Dio_offset_align), int(st.Dio_mem_align)
	if offset == 0 || offset > 4096 || memory > block.BufferAlign {
		return alignment{works: false, offset: 4096, memory: 4096}, nil
	}
	if offset > 512 {
		offset = 4096
	} else {
		offset = 512
	}
	return alignment{works: true, offset: offset, memory: max(memory, 512)}, nil
}

// setDirect switches the descriptor to direct I/O, and reports false where the
// filesystem has none. It is not done at open, so that there is only ever one
// open file description.
func setDirect(fd int) (bool, error) {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return false, err
	}
	_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags|unix.O_DIRECT)
	if errors.Is(err, unix.EINVAL) {
		return false, nil
	}
	return err == nil, err
}

// sizeOf is the size in bytes, rounded down to logical blocks.
func sizeOf(fd, logicalBytes int) (int64, error) {
	n, err := unix.Seek(fd, 0, unix.SEEK_END) // files and block devices alike
	if err != nil {
		return 0, fmt.Errorf("size: %w", err)
	}
	return n - n%int64(logicalBytes), nil
}

func (d *Device) probeFile() error {
	var fs unix.Statfs_t
	if _, err := retryEINTR(func() (int, error) { return 0, unix.Fstatfs(d.fd, &fs) }); err != nil {
		return fmt.Errorf("filesystem: %w", err)
	}
	d.geo.SharedCAW = isLocalFilesystem(uint32(fs.Type))
	if d.opts.ReadOnly {
		return nil
	}
	// A hole past the end of the file changes nothing.
	const page = 4096
	past := (d.size.Load()+page-1)/page*page + page
	err := punchHole(d.fd, past, page)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("punch a hole past the end: %w", err)
	}
	d.punches = true
	l := int64(d.geo.LogicalBytes)
	d.geo.DiscardBytes = (max(fs.Bsize, l) + l - 1) / l * l
	return nil
}

// probeDiscardBlock reads the discard granularity of a block device from sysfs;
// what sysfs does not show is taken as no discard.
func (d *Device) probeDiscardBlock() error {
	if d.opts.ReadOnly {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return err
	}
	base := fmt.Sprintf("/sys/dev/block/%d:%d/", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	if most := readNumber(base+"queue/discard_max_bytes", base+"../queue/discard_max_bytes"); most == 0 {
		return nil
	}
	g := readNumber(base+"queue/discard_granularity", base+"../queue/discard_granularity")
	l := int64(d.geo.LogicalBytes)
	d.geo.DiscardBytes = (max(g, l) + l - 1) / l * l
	return nil
}

// readNumber reads the first of the files that exists (a partition has its queue
// in its parent), 0 if none does.
func readNumber(paths ...string) int64 {
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
		if err == nil {
			return n
		}
	}
	return 0
}
