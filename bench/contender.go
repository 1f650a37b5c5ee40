package bench

import (
	"context"
	"slices"
	"time"

	"github.com/lmctl/lmctl/internal/hypervisor/qemu"
	"github.com/lmctl/lmctl/internal/lab"
)

// Contender is a way to move a guest.
type Contender struct {
	Name  string
	Title string

	keeper *keeper
	travel travel   // of byBench's
	order  *command // of byLibvirt's
}

// keeper starts guests. Contenders with the same keeper share a guest.
type keeper struct {
	name string
	// hypervisor is that of the labs in which it keeps guests.
	hypervisor lab.Hypervisor
	// limit is how long a migration may take; one that does not converge ends
	// there, and has failed.
	limit time.Duration
	// start starts a guest on the host of that index.
	start func(ctx context.Context, b *bed, name string, w Workload, at int) (subject, error)
}

var (
	byAgents  = &keeper{"agents", lab.QEMU, 10 * time.Second, startManaged}
	byBench   = &keeper{"bench", lab.QEMU, 10 * time.Second, startUnmanaged}
	byLibvirt = &keeper{"libvirt", lab.Libvirt, time.Minute, startDomain}
)

// subject is a guest in a keeper's hands.
type subject interface {
	// place is where the guest runs, next where move will take it.
	place() place
	next() (host string, memory coming)
	// pause has the guest not disturb while others are measured, resume makes it
	// fit to be moved.
	pause(ctx context.Context) error
	resume(ctx context.Context) error
	// move takes the guest to the other host, in the contender's way, and returns
	// when it runs there and the command is done.
	move(ctx context.Context, c Contender) (account, error)
	// close removes the guest.
	close(ctx context.Context) error
}

// account gets what a contender says of the migration that it has just done.
type account func(ctx context.Context) (Own, error)

// said is an account that is known already.
func said(own Own) account { return func(context.Context) (Own, error) { return own, nil } }

// travel is how a guest of the bench's own gets to a destination that waits for
// it, and runs there.
type travel func(ctx context.Context, u *unmanaged, destination *qemu.Observer) (Own, error)

// place is a guest on a host.
type place struct {
	host    string
	memory  string // path of its memory file
	console string // path of its serial console's socket
	pid     int    // 0 before it is there
	// accelerator is what runs its instructions.
	accelerator string
}

// Own is what a contender says of a migration itself. What it does not tell is
// zero.
type Own struct {
	// Downtime is from the guest being stopped until it was running again. Its
	// clock stands still for longer where it takes time to go on, as with an
	// emulated guest whose code is translated again.
	Downtime time.Duration `json:"downtime_ns,omitempty"`
	Passes   int           `json:"passes,omitempty"`
	Reason   string        `json:"switchover_reason,omitempty"`
	Parts    []Part        `json:"parts,omitempty"`
	// Apart is what was done while the guest stood still and is not the
	// contender's: it is not charged with it.
	Apart time.Duration `json:"apart_ns,omitempty"`
}

// Part is a step of a downtime.
type Part struct {
	Name string        `json:"name"`
	Took time.Duration `json:"ns"`
}

// comparableDowntime is the downtime that contenders with a target are given:
// lmctl's default.
const comparableDowntime = 30 * time.Millisecond

// Contenders are all there are for guests of a hypervisor.
func Contenders(h lab.Hypervisor) []Contender {
	return slices.DeleteFunc(contenders(), func(c Contender) bool { return c.keeper.hypervisor != h })
}

func contenders() []Contender {
	return []Contender{
		{Name: "lmctl", Title: "lmctl, its defaults", keeper: byAgents},
		{Name: "qemu", Title: "QEMU's pre-copy, its defaults", keeper: byBench, travel: precopy(nil)},
		{
			Name: "qemu-unlimited", Title: "QEMU's pre-copy, no bandwidth limit",
			keeper: byBench, travel: precopy(parameters{"max-bandwidth": 1 << 40}),
		},
		{
			Name: "qemu-30ms", Title: "QEMU's pre-copy, no bandwidth limit, downtime limit 30 ms", keeper: byBench,
			travel: precopy(parameters{"max-bandwidth": 1 << 40, "downtime-limit": comparableDowntime.Milliseconds()}),
		},
		{
			Name: "floor", Title: "QEMU's stop, save and load of the device state, and cont; memory copied in between is not counted",
			keeper: byBench, travel: travelStopped,
		},
		{Name: "lmctl", Title: "lmctl migrate GUEST HOST, its defaults: direct", keeper: byLibvirt, order: &byLmctl},
		{
			Name: "virsh", Title: "virsh migrate --live --unsafe --persistent --undefinesource GUEST qemu+tcp://HOST/system",
			keeper: byLibvirt, order: &byVirsh,
		},
	}
}
