package dirtymap

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
)

// Process names a process for good: the PID for /proc and ptrace, the pidfd
// because a PID may be used again. The pidfd stays the caller's, and is to be
// valid for as long as anything here uses it.
type Process struct {
	PID   int
	PIDFD int
}

// verify checks that the pidfd's process lives and has the PID.
func (p Process) verify() error {
	pid, err := sys.PidfdPID(p.PIDFD)
	switch {
	case errors.Is(err, unix.ESRCH):
		return fmt.Errorf("process %d: %w", p.PID, ErrExited)
	case err != nil:
		return err
	case pid != p.PID:
		return fmt.Errorf("%w: %d and %d", ErrMismatch, p.PID, pid)
	}
	exited, err := sys.PidfdExited(p.PIDFD)
	if err != nil {
		return err
	}
	if exited { // a zombie: its parent has not looked yet
		return fmt.Errorf("process %d: %w", p.PID, ErrExited)
	}
	return nil
}
