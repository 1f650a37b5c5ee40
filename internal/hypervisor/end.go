package hypervisor

import (
	"fmt"
	"time"
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
	EndSaved       EndCause = "saved"        // its state was saved to a file, from which it can go on
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
