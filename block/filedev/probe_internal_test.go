package filedev

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestNetworkAndStackedFilesystemsAreNotLocal(t *testing.T) {
	for magic, want := range map[uint32]bool{
		unix.EXT4_SUPER_MAGIC:      true,
		unix.XFS_SUPER_MAGIC:       true,
		unix.BTRFS_SUPER_MAGIC:     true,
		unix.TMPFS_MAGIC:           true,
		zfsMagic:                   true,
		unix.NFS_SUPER_MAGIC:       false,
		unix.SMB2_SUPER_MAGIC:      false,
		unix.FUSE_SUPER_MAGIC:      false,
		unix.V9FS_MAGIC:            false,
		unix.OVERLAYFS_SUPER_MAGIC: false,
		0x7461636f:                 false, // ocfs2: local looks, several kernels
		0x01161970:                 false, // gfs2
		0:                          false,
	} {
		if got := isLocalFilesystem(magic); got != want {
			t.Errorf("filesystem %#x: local = %v, want %v", magic, got, want)
		}
	}
}
