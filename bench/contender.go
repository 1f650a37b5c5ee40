package bench

import (
	"context"
	"time"
)

// Contender is a way to move a guest.
type Contender struct {
	Name  string
	Title string
	// IdleOnly says that the contender has no pre-copy and thus nothing to show
	// with a guest that writes.
	IdleOnly bool

	start func(ctx context.Context, b *bed, name string, definition []byte) (subject, error)
}

// subject is a guest in a contender's hands.
type subject interface {
	// place is where the guest runs, next where move will take it.
	place() place
	next() place
	// pause stops the guest while others are measured, resume undoes it.
	pause(ctx context.Context) error
	resume(ctx context.Context) error
	// move takes the guest to the other host and returns when it runs there and
	// the command is done.
	move(ctx context.Context) (Own, error)
	// close removes the guest.
	close(ctx context.Context) error
}

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
	Downtime time.Duration `json:"downtime_ns,omitempty"`
	Passes   int           `json:"passes,omitempty"`
	Reason   string        `json:"switchover_reason,omitempty"`
	Parts    []Part        `json:"parts,omitempty"`
	// timed says that Downtime, the sum of Parts, stands for what is seen from
	// outside: work that is not the contender's was done in between.
	timed bool
}

// Part is a step of a downtime.
type Part struct {
	Name string        `json:"name"`
	Took time.Duration `json:"ns"`
}

// comparableDowntime is the downtime that contenders with a target are given:
// lmctl's default.
const comparableDowntime = 30 * time.Millisecond

// Contenders are all there are.
func Contenders() []Contender {
	return []Contender{
		{Name: "lmctl", Title: "lmctl, its defaults", start: startManaged},
		{Name: "qemu", Title: "QEMU's pre-copy, its defaults", start: ownPrecopy(settings{})},
		{
			Name: "qemu-unlimited", Title: "QEMU's pre-copy, no bandwidth limit",
			start: ownPrecopy(settings{parameters: map[string]int64{"max-bandwidth": 1 << 40}}),
		},
		{
			Name: "qemu-30ms", Title: "QEMU's pre-copy, no bandwidth limit, downtime limit 30 ms",
			start: ownPrecopy(settings{parameters: map[string]int64{
				"max-bandwidth": 1 << 40, "downtime-limit": comparableDowntime.Milliseconds(),
			}}),
		},
		{Name: "floor", Title: "QEMU's stop, save and load of the device state, cont", IdleOnly: true, start: startFloor},
	}
}
