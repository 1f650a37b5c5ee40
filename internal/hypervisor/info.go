package hypervisor

import "time"

// Info is a snapshot of a guest.
type Info struct {
	Name     string
	UUID     string
	State    State
	Busy     string // the operation under way, empty if none
	Runstate string // the hypervisor's own word, empty without a process
	PID      int    // zero without a process
	Memory   int64  // bytes
	VCPUs    int
	Bridges  []string // that its network cards need on the host
	// Machine, Accelerator, CPU and Version are what the guest was started
	// with, empty if it never was.
	Machine     string
	Accelerator string // kvm or tcg
	CPU         string
	Version     string // of QEMU
	Started     time.Time
	End         *End // how it last ended, nil while it runs or if it never did
	// Suspended says that a migration of this guest was begun and neither
	// undone nor completed: Driver.Source, then Resume or Release.
	Suspended bool
	// Arriving says that the guest has come here and is not yet one like any
	// other: what is known of it beside its process is not the hypervisor's to keep
	// yet.
	Arriving bool
	// Mode is the one in which the guest would migrate, empty if in none, and
	// ModeReason says why, in a sentence.
	Mode        string
	ModeReason  string
	LogPath     string
	ConsolePath string // unix socket of the serial console
	ConsoleLog  string
	Observer    string // unix socket for QMP, for people and tests
}
