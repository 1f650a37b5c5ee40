package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/flat"
)

// coming is a memory file that is not there yet.
type coming struct {
	// folder is where it will be, or a folder that has it.
	folder string
	// find says where it is, or os.ErrNotExist.
	find func() (string, error)
}

// comingAt is a memory file whose path is known before.
func comingAt(path string) coming {
	return coming{filepath.Dir(path), func() (string, error) { return path, nil }}
}

// arrival waits for a memory file that is to come.
type arrival struct {
	coming
	inotify *os.File
}

// changes are what happens in a folder to which a memory file comes.
const changes = unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_MODIFY | unix.IN_OPEN

func expect(memory coming) (*arrival, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("bench: watch %s: %w", memory.folder, err)
	}
	a := &arrival{memory, os.NewFile(uintptr(fd), "inotify")}
	if err := a.watch(memory.folder); err != nil {
		return nil, errors.Join(err, a.inotify.Close())
	}
	return a, nil
}

// watch has what happens in a folder wake the waiting; once more does no harm.
func (a *arrival) watch(folder string) error {
	raw, err := a.inotify.SyscallConn()
	if err != nil {
		return fmt.Errorf("bench: watch %s: %w", folder, err)
	}
	var failed error
	err = raw.Control(func(fd uintptr) { _, failed = unix.InotifyAddWatch(int(fd), folder, changes) })
	if err = errors.Join(err, failed); err != nil {
		return fmt.Errorf("bench: watch %s: %w", folder, err)
	}
	return nil
}

// watchInner watches the folders in the folder, which come and go.
func (a *arrival) watchInner() error {
	entries, err := os.ReadDir(a.folder)
	if err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		if err := a.watch(filepath.Join(a.folder, e.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// add has the probe watch the file as soon as it has its length.
func (a *arrival) add(ctx context.Context, probe *flat.Probe, counter int64) (err error) {
	defer func() { err = errors.Join(err, a.inotify.Close()) }()
	stop := context.AfterFunc(ctx, func() { _ = a.inotify.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 64<<10)
	for {
		// Before it is looked for: what comes later is then seen to come.
		if err := a.watchInner(); err != nil {
			return err
		}
		if path, err := a.there(counter); err == nil {
			return probe.Add(path, counter)
		} else if !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("bench: %w", err)
		}
		if _, err := a.inotify.Read(buf); err != nil {
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			return fmt.Errorf("bench: wait for a memory file in %s: %w", a.folder, err)
		}
	}
}

// there is where the file is; os.ErrNotExist too if it has not its length.
func (c coming) there(counter int64) (string, error) {
	path, err := c.find()
	if err != nil {
		return "", err
	}
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if info.Size() <= counter {
		return "", os.ErrNotExist
	}
	return path, nil
}
