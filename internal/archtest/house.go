package archtest

// House gives the rules of this module. A new package takes its place here first;
// CONTRIBUTING.md tells how to choose the floor.
func House() *Rules {
	return &Rules{
		Floors: []Floor{
			{
				Name: "words",
				Packages: []string{
					"block", "block/unit", "internal/clock",
					"scsi", "iscsi/pdu", "nbd/wire", "nfs/xdr", "nfs/rpc",
				},
				TestOnly: []string{"block/blocktest", "internal/archtest"},
			},
			{
				Name:     "devices",
				Packages: []string{"block/filedev", "iscsi/initiator", "nfs/client", "lease", "thinprov/layout"},
				TestOnly: []string{"block/simdev", "block/faultdev"},
			},
			{
				Name: "engines",
				Packages: []string{
					"vmfs", "thinprov", "thinprov/cowtree", "nfs", "iscsi", "nbd", "vhost", "cluster",
					"hypervisor", "hypervisor/qmp", "hypervisor/kvmprobe", "backup", "ovf",
				},
			},
			{Name: "service", Packages: []string{"datastore", "migrate"}},
			{Name: "whole", Packages: []string{"store", "agent", "api", "ui"}},
			{Name: "commands", Packages: []string{"cmd/basalt"}},
		},
		Side: []string{"sim", "fuzz", "bench", "e2e"},
		Bridges: []Bridge{
			{"block/unit", "block", "a unit is a record swapped on a block.Device"},
			{"block/blocktest", "block", "the suite states what a block.Device promises"},
		},
		Bans:      bans(),
		ReadsTime: []string{"internal/clock", "cmd", "e2e", "bench"},
		MaxLines:  600,
		BadNames:  []string{"util", "utils", "common", "helper", "helpers", "types", "models", "misc", "shared"},
	}
}

func bans() []Ban {
	consensus := []string{"cluster", "github.com/hashicorp/raft", "github.com/hashicorp/raft-wal"}
	return []Ban{
		{[]string{"vmfs"}, consensus, "vmfs must mount when raft is down"},
		{[]string{"lease"}, consensus, "the LUN alone decides who is alive and who owns a disk"},
		{
			[]string{"thinprov", "nbd", "iscsi", "nfs", "vhost", "datastore"}, consensus,
			"guest I/O never waits for raft",
		},
		{
			[]string{"store"}, append([]string{"agent", "api", "ui"}, consensus...),
			"a panic in the API or an upgrade of the agent must not stall guest I/O",
		},
		{
			[]string{"thinprov"}, []string{"vmfs", "nfs", "lease"},
			"the disk engine runs over any Store: a VMFS object, a NAS file, memory",
		},
		{[]string{"vmfs"}, []string{"thinprov"}, "the volume owns slabs, not what is in them"},
		{[]string{"lease"}, []string{"vmfs", "nfs"}, "VMFS and NAS volumes share one liveness protocol"},
		{
			[]string{"hypervisor"}, []string{"vmfs", "thinprov", "nbd", "vhost", "lease"},
			"a VM sees sockets and paths; how its disks are kept is the store's affair",
		},
		{
			[]string{"block", "block/unit", "scsi", "iscsi/pdu", "nbd/wire", "nfs/xdr", "nfs/rpc"},
			[]string{"os", "os/exec", "net", "net/http", "syscall", "golang.org/x/sys"},
			"words and codecs do no I/O, so that checkers, fuzzers and simulations can call them",
		},
		{[]string{"*"}, []string{"testing"}, "test support must not ship in the binary"},
		{
			[]string{"*"}, []string{"github.com/gostor/gotgt", "github.com/vmware/go-nfs-client"},
			"measured unfit for a data path; e2e and bench use them as peers",
		},
	}
}
