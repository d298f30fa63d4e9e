package archtest_test

import (
	"os"
	"testing"

	"basalt/internal/archtest"
)

func load(t *testing.T) *archtest.Tree {
	t.Helper()
	tree, err := archtest.Load(os.DirFS("../.."))
	if err != nil {
		t.Fatal(err)
	}
	if tree.Packages["block"] == nil || tree.Packages["internal/clock"] == nil {
		t.Fatalf("module %s was not read: %d packages", tree.Module, len(tree.Packages))
	}
	return tree
}

func TestPackagesImportOnlyLowerFloors(t *testing.T) {
	for _, v := range archtest.House().Layering(load(t)) {
		t.Error(v)
	}
}

func TestFilesKeepTheHouseHabits(t *testing.T) {
	for _, v := range archtest.House().Habits(load(t)) {
		t.Error(v)
	}
}
