package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// loadModules inserts every module of dir. Their names do not sort by
// dependency, so passes repeat while one more goes in.
func loadModules(dir string) error {
	paths, err := filepath.Glob(filepath.Join(dir, "*.ko"))
	if err != nil {
		return err
	}
	for len(paths) > 0 {
		var left []string
		var last error
		for _, path := range paths {
			if err := insert(path); err != nil {
				last = fmt.Errorf("insert %s: %w", filepath.Base(path), err)
				left = append(left, path)
			}
		}
		if len(left) == len(paths) {
			return last
		}
		paths = left
	}
	return nil
}

func insert(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}
