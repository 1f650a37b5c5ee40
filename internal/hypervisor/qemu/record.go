package qemu

import (
	"time"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/nics"
)

// record is what the driver keeps of a guest beside its definition.
type record struct {
	// Run is how the guest was started, and stays after its end.
	Run *runRecord `json:"run,omitempty"`
	// End is how it last ended, nil while it runs.
	End *hypervisor.End `json:"end,omitempty"`
	// Incoming marks a shell whose CPUs were never told to run.
	Incoming bool `json:"incoming,omitempty"`
	// Released marks a guest that another host owns: whatever is left of it
	// here is to be removed.
	Released bool `json:"released,omitempty"`
	// Cards is what the host where the guest came from knew of its cards, by
	// MAC.
	Cards map[string]nics.Facts `json:"cards,omitempty"`
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
