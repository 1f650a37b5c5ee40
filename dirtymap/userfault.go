package dirtymap

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
)

const uffdFlags = unix.O_CLOEXEC | unix.O_NONBLOCK | sys.UserModeOnly

// uffdLink is what the links in /proc/PID/fd of a userfaultfd read.
const uffdLink = "anon_inode:[userfaultfd]"

// borrowUserfault has the process create a userfaultfd and hand it over. When it
// returns, the process has no descriptor of it, with or without an error.
func borrowUserfault(p Process) (int, error) {
	ours := -1
	err := inject(p, func(call sysCall) error {
		theirs, err := call(unix.SYS_USERFAULTFD, uffdFlags)
		if err != nil {
			return fmt.Errorf("userfaultfd in process %d: %w", p.PID, classify(err))
		}
		ours, err = sys.PidfdGetfd(p.PIDFD, int(theirs))
		err = classify(err)
		afterStep("copied")
		if _, cerr := call(unix.SYS_CLOSE, theirs); cerr != nil {
			err = errors.Join(err, fmt.Errorf("close userfaultfd in process %d: %w", p.PID, cerr))
		}
		return err
	})
	if err != nil && ours >= 0 {
		err = errors.Join(err, unix.Close(ours))
		ours = -1
	}
	return ours, err
}

// Leftovers lists the userfaultfds that a process holds itself. An agent that
// was killed in the middle of Attach may leave one there, which CleanUp closes.
// A hypervisor's own (in post-copy or background snapshots) are among them.
func Leftovers(pid int) ([]int, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("process %d: %w", pid, ErrExited)
		}
		return nil, classify(err)
	}
	var fds []int
	for _, e := range entries {
		link, err := os.Readlink(dir + "/" + e.Name())
		if errors.Is(err, os.ErrNotExist) { // closed meanwhile
			continue
		}
		if err != nil {
			return nil, classify(err)
		}
		if link != uffdLink {
			continue
		}
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			return nil, fmt.Errorf("%s: %w", dir, err)
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// CleanUp has a process close its Leftovers, all of them. It is for processes
// that are known to use no userfaultfd of their own.
func CleanUp(p Process) error {
	if err := p.verify(); err != nil {
		return err
	}
	fds, err := Leftovers(p.PID)
	if err != nil || len(fds) == 0 {
		return err
	}
	return inject(p, func(call sysCall) error {
		for _, fd := range fds {
			if _, err := call(unix.SYS_CLOSE, uint64(fd)); err != nil {
				return fmt.Errorf("close userfaultfd %d in process %d: %w", fd, p.PID, err)
			}
		}
		return nil
	})
}
