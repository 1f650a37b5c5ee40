package dirtymap

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Errors of Probe, Attach, CleanUp and of a Tracker's methods; match them with
// errors.Is. ErrUnsupported is the standard library's errors.ErrUnsupported.
var (
	// ErrUnsupported: the kernel, the processor or the tracked process lacks
	// something. Trying again does not help.
	ErrUnsupported = errors.ErrUnsupported
	// ErrPermission: the kernel can, but this process may not.
	ErrPermission = errors.New("not permitted")
	// ErrExited: the process has ended.
	ErrExited = errors.New("process has exited")
	// ErrMismatch: the PID does not belong to the process of the pidfd.
	ErrMismatch = errors.New("PID and pidfd name different processes")
	// ErrBusy: the main thread did not stop in time, it sleeps in the kernel
	// where nothing interrupts it. It may work later.
	ErrBusy = errors.New("main thread does not respond")
	// ErrClosed: the Tracker was closed.
	ErrClosed = errors.New("tracker is closed")
	// ErrTraced: another process traces this one; the error is a *TracedError.
	ErrTraced = errors.New("process is being traced")
)

// TracedError says who traces a process. It matches ErrTraced.
type TracedError struct {
	PID    int
	Tracer int // PID of the tracer; zero if it could not be found out
}

func (e *TracedError) Error() string {
	if e.Tracer == 0 {
		return fmt.Sprintf("process %d is being traced", e.PID)
	}
	return fmt.Sprintf("process %d is being traced by process %d", e.PID, e.Tracer)
}

// Is makes the error match ErrTraced.
func (e *TracedError) Is(target error) bool { return target == ErrTraced }

// classify adds the sentinel that an errno of the kernel stands for.
func classify(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.ECHILD):
		return fmt.Errorf("%w: %w", ErrExited, err)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: %w", ErrPermission, err)
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.ENOTTY):
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	return err
}
