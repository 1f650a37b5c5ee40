package qemu

import (
	"fmt"
	"time"
)

// State is where a guest of this host stands.
type State string

// The states of a guest.
const (
	StateStopped   State = "stopped"   // defined, no process; End says how it ended if it ever ran
	StateStarting  State = "starting"  // the process exists, the CPUs do not run yet
	StateRunning   State = "running"   // the CPUs run
	StatePaused    State = "paused"    // stopped by an operator or by an I/O error; it can go on
	StateMigrating State = "migrating" // its device state is being handed over: suspended, or about to be
	StateIncoming  State = "incoming"  // a shell at the destination, the CPUs never ran here
	StateStopping  State = "stopping"  // it ended, the process is being removed
	// StateUnreachable: the process lives but does not answer, as when its
	// storage hangs, and is adopted when it does; or, without a PID, it could
	// not be found out at the start of the agent whether there is a process.
	StateUnreachable State = "unreachable"
)

// EndCause says why a guest does not run any more.
type EndCause string

// The causes of an end.
const (
	EndPoweredDown EndCause = "powered-down" // the guest switched itself off
	EndStopped     EndCause = "stopped"      // an operator asked the guest to power down, and it did
	EndDestroyed   EndCause = "destroyed"    // an operator had it ended at once
	EndCrashed     EndCause = "crashed"      // the guest's kernel panicked, or its CPU state was beyond repair
	EndKilled      EndCause = "killed"       // QEMU was killed by a signal
	EndExited      EndCause = "exited"       // QEMU exited by itself
	EndVanished    EndCause = "vanished"     // it ended while no agent watched, nobody can say how
	EndMigrated    EndCause = "migrated"     // it runs on another host
	EndFailed      EndCause = "start-failed" // QEMU did not start
)

// End is how a guest ended.
type End struct {
	Cause  EndCause  `json:"cause"`
	Signal int       `json:"signal,omitempty"` // for EndKilled
	Status int       `json:"status,omitempty"` // for EndExited
	Detail string    `json:"detail,omitempty"` // in words, QEMU's own where it had any
	At     time.Time `json:"at"`               // when it was noticed
}

func (e End) String() string {
	s := string(e.Cause)
	switch e.Cause {
	case EndKilled:
		s = fmt.Sprintf("killed by signal %d", e.Signal)
	case EndExited:
		s = fmt.Sprintf("exited with status %d", e.Status)
	}
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	return s
}

// record is what the driver keeps of a guest beside its definition.
type record struct {
	// Run is how the guest was started, and stays after its end.
	Run *runRecord `json:"run,omitempty"`
	// End is how it last ended, nil while it runs.
	End *End `json:"end,omitempty"`
	// Incoming marks a shell whose CPUs were never told to run.
	Incoming bool `json:"incoming,omitempty"`
	// Released marks a guest that another host owns: whatever is left of it
	// here is to be removed.
	Released bool `json:"released,omitempty"`
	// Cards is what the host where the guest came from knew of its cards, by
	// MAC.
	Cards map[string]cardFacts `json:"cards,omitempty"`
}

// runRecord is what was chosen when the guest was started; it stays with the
// guest from host to host until it ends.
type runRecord struct {
	Machine     string      `json:"machine"` // versioned
	Accelerator Accelerator `json:"accelerator"`
	CPU         string      `json:"cpu"`
	QEMU        string      `json:"qemu"` // path of the binary
	FirmwareDir string      `json:"firmware_dir,omitempty"`
	Version     string      `json:"version"` // of that QEMU
	Started     time.Time   `json:"started"`
}

// Info is a snapshot of a guest.
type Info struct {
	Name       string
	UUID       string
	State      State
	Busy       string // the operation under way, empty if none
	Runstate   string // QEMU's own word, empty without a process
	PID        int    // zero without a process
	Definition Definition
	// Machine, Accelerator, CPU and Version are what the guest was started
	// with, empty if it never was.
	Machine     string
	Accelerator Accelerator
	CPU         string
	Version     string
	Started     time.Time
	End         *End // how it last ended, nil while it runs or if it never did
	// Suspended says that a migration of this guest was begun and neither
	// undone nor completed: Driver.Source, then Resume or Release.
	Suspended   bool
	LogPath     string
	ConsolePath string // unix socket of the serial console
	ConsoleLog  string
	Observer    string // unix socket for QMP, for people and tests
}
