package hypervisor

import (
	"errors"
	"fmt"
)

// The errors that a caller may want to tell apart. They are wrapped with the
// guest's name.
var (
	ErrNotFound = errors.New("there is no such guest on this host")
	ErrExists   = errors.New("there is already a guest of this name or UUID on this host")
)

// BusyError says that another operation on the guest is under way.
type BusyError struct {
	Guest     string
	Operation string // the one under way
}

func (e *BusyError) Error() string {
	return fmt.Sprintf("guest %s is busy: %s is under way; wait for its end", e.Guest, e.Operation)
}

// StateError says that the guest is not in a state for the operation.
type StateError struct {
	Guest     string
	Operation string
	State     State
}

func (e *StateError) Error() string {
	return fmt.Sprintf("cannot %s guest %s: it is %s", e.Operation, e.Guest, e.State)
}

// ErrStillRunning says that a guest did not power down in time. It runs on.
var ErrStillRunning = errors.New("the guest has not powered down in time and runs on; wait longer, or destroy it")
