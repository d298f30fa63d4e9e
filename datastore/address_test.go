package datastore_test

import (
	"testing"

	"basalt/datastore"
)

func TestAddressesSplitAtTheLastColonSlash(t *testing.T) {
	for text, want := range map[string]datastore.Address{
		"lun.img":                     {LUN: "lun.img"},
		"/dev/sdb":                    {LUN: "/dev/sdb"},
		"/a/lun.img:/vm1/d0":          {LUN: "/a/lun.img", Path: "/vm1/d0"},
		"lun.img:/":                   {LUN: "lun.img", Path: "/"},
		"lun.img:/vm1/d0@monday":      {LUN: "lun.img", Path: "/vm1/d0", Snapshot: "monday"},
		"iscsi://h:3260/iqn.x/1":      {LUN: "iscsi://h:3260/iqn.x/1"},
		"iscsi://h:3260/iqn.x/1:/d0":  {LUN: "iscsi://h:3260/iqn.x/1", Path: "/d0"},
		"nfs://h/export:/vm1/d0@snap": {LUN: "nfs://h/export", Path: "/vm1/d0", Snapshot: "snap"},
		"/odd:/name.img:/d0":          {LUN: "/odd:/name.img", Path: "/d0"},
	} {
		got, err := datastore.ParseAddress(text)
		if err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", text, got, err, want)
			continue
		}
		if back := got.String(); back != text {
			t.Errorf("%q came back as %q", text, back)
		}
	}
	for _, text := range []string{"", ":/d0", "lun:/a//b", "lun:/d0@", "lun:/d0@a@b", "lun:/a/../b", "lun:/d0\x01"} {
		if got, err := datastore.ParseAddress(text); err == nil {
			t.Errorf("%q was taken for %+v", text, got)
		}
	}
}
