package hypervisor

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// lockRunDir takes the lock that a QEMU inherits and so holds for its life:
// ErrRunning while another one does.
func lockRunDir(runDir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(runDir, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = ErrRunning
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("hypervisor: %s: %w", runDir, err), f.Close())
	}
	return f, nil
}

// prepareRunDir makes the folder, which must belong to the starter alone.
func prepareRunDir(runDir string) error {
	if err := os.MkdirAll(filepath.Dir(runDir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(runDir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Lstat(runDir)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.IsDir() || int(st.Uid) != os.Geteuid() || info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%w: run folder %s must be a folder with mode 0700 of the starter's own", ErrSpec, runDir)
	}
	return nil
}

// inherited opens what QEMU gets as descriptors 0 to 5, after the lock is held.
// On error nothing stays open but the lock.
func inherited(s Spec, lock *os.File) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files, lock)
			files = nil
		}
	}()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return files, err
	}
	files = append(files, null)
	log, err := os.OpenFile(filepath.Join(s.RunDir, logName), os.O_CREATE|os.O_TRUNC|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return files, err
	}
	files = append(files, log, log, lock)
	monitor, err := listen(filepath.Join(s.RunDir, qmpName))
	if err != nil {
		return files, err
	}
	files = append(files, monitor)
	console, err := openConsole(s)
	if err != nil {
		return files, err
	}
	return append(files, console), nil
}

func openConsole(s Spec) (*os.File, error) {
	if s.Console == ConsoleFile {
		return os.OpenFile(consolePath(s), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	}
	return listen(consolePath(s))
}

func consolePath(s Spec) string {
	if s.Console == ConsoleFile {
		return filepath.Join(s.RunDir, consoleLogName)
	}
	return filepath.Join(s.RunDir, consoleSocketName)
}

// listen returns a listening socket that stays on disk when closed. The folder's
// mode keeps others out.
func listen(path string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	return f, errors.Join(err, l.Close())
}

// closeAll closes each file once, except keep.
func closeAll(files []*os.File, keep *os.File) {
	for i, f := range files {
		if f == keep || i > 0 && f == files[i-1] {
			continue
		}
		// Nothing was written through these here; a failed close loses nothing.
		_ = f.Close()
	}
}
