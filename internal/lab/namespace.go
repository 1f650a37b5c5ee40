package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// netnsDir is where ip-netns(8) and everybody else keep named namespaces.
const netnsDir = "/run/netns"

// makeNamespace makes a named network namespace.
func makeNamespace(name string) error {
	return onOwnThread(func() error {
		h, err := netns.NewNamed(name)
		if err != nil {
			return fmt.Errorf("lab: make network namespace %s: %w", name, err)
		}
		return h.Close()
	})
}

// inNamespace runs f on a thread that is in a named network namespace. What f
// starts inherits it: sockets, processes; goroutines do not.
func inNamespace(name string, f func() error) error {
	return onOwnThread(func() error {
		if err := setNamespace(name); err != nil {
			return err
		}
		return f()
	})
}

// onOwnThread runs f on a thread that ends with it, so that whatever namespace f
// left it in, nobody else ever runs there.
func onOwnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != os.Getpid() {
			done <- f() // never unlocked: the thread ends with this
			return
		}
		// The main thread cannot end, and /proc/self shows its namespaces as
		// the process's. As long as it is held here, nobody else gets it.
		defer runtime.UnlockOSThread()
		done <- onOwnThread(f)
	}()
	return <-done
}

// removeNamespaces removes the named namespaces of a lab, as far as they were
// made.
func removeNamespaces(id string) error {
	paths, err := filepath.Glob(filepath.Join(netnsDir, namespacePrefix(id)+"*"))
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	var errs []error
	for _, path := range paths {
		// EINVAL: the file was made, but nothing was mounted on it yet.
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("lab: unmount %s: %w", path, err))
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("lab: %w", err))
		}
	}
	return errors.Join(errs...)
}

// namespaceInodes are what /proc/PID/ns/net of a lab's processes says.
func namespaceInodes(id string) (map[uint64]bool, error) {
	entries, err := os.ReadDir(netnsDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("lab: %w", err)
	}
	own, err := inode("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	inodes := make(map[uint64]bool)
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), namespacePrefix(id)) {
			continue
		}
		path := filepath.Join(netnsDir, e.Name())
		var fs unix.Statfs_t
		if err := unix.Statfs(path, &fs); err != nil {
			return nil, fmt.Errorf("lab: %s: %w", path, err)
		}
		if fs.Type != unix.NSFS_MAGIC {
			continue // made, but nothing mounted on it yet
		}
		ino, err := inode(path)
		if err != nil {
			return nil, err
		}
		if ino != own {
			inodes[ino] = true
		}
	}
	return inodes, nil
}

func inode(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("lab: %s: %w", path, err)
	}
	return st.Ino, nil
}
