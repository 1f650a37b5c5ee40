package hypervisor

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
	// StateRemoved is seen by watchers only: the guest is no longer on this host.
	StateRemoved State = "removed"
)
