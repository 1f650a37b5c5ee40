package migrate

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/lmctl/lmctl/dirtymap"
)

// Options are one migration's. The zero value of a field means its default.
type Options struct {
	MaxPasses      int           // live passes at most; 8
	DowntimeTarget time.Duration // end pre-copy when the rest fits into this; 30 ms
	Bandwidth      int64         // bytes a second for the live passes, 0 for no limit; the switchover is never limited
	Streams        int           // parallel data connections; 2
	Verify         bool          // hash every page on both sides while the guest is stopped
	Mode           Mode          // empty for direct, or else relay
	Compress       bool          // in relay mode, where the hypervisor's stream is compressed
	Timeout        time.Duration // for the whole migration, 0 for none; it cannot interrupt a commit
}

// Sender moves guests away from this host.
type Sender struct {
	Host   string // this host's name, as its certificate says
	Ledger SourceLedger
	Log    *slog.Logger
	// Track attaches a dirty-page tracker to a process.
	Track func(Process, []dirtymap.Region) (Tracker, error)
	// PeerTimeout is how long the other host may be silent before the
	// migration fails; 5 s by default.
	PeerTimeout time.Duration
}

// Tracker finds the pages that were written since it last looked.
// dirtymap.Tracker is one.
type Tracker interface {
	// Collect adds the pages written since the last Collect to the bitmaps,
	// one for each region, and forgets them.
	Collect([]*dirtymap.Bitmap) error
	// Peek adds them without forgetting.
	Peek([]*dirtymap.Bitmap) error
	// Close leaves nothing behind in the tracked process.
	Close() error
}

// Job is one migration to run.
type Job struct {
	ID          string // a UUID, fresh for each attempt
	Guest       Guest
	Epoch       uint64 // the guest's epoch at the source
	Destination string // the destination's host name
	Dial        func(context.Context) (net.Conn, error)
	Options     Options
	// Observe, if set, is called for every change of state and some times a
	// second while pages are copied. It must not block.
	Observe func(Progress)
}

// Progress is a snapshot of a migration under way.
type Progress struct {
	State State // where the source is
	Pass  int   // the pass under way, 0 before the first
	// CopiedPages of PassPages are done in this pass; neither ever decreases
	// within a pass.
	CopiedPages, PassPages int64
	BytesSent              int64
	Rate                   float64 // bytes a second, over this pass
	Passes                 []Pass  // the finished ones
}

// Error is how a migration fails: what came of the guest, and where and why.
type Error struct {
	Result Result // Refused, Failed, Cancelled or InDoubt
	State  State  // the state in which it happened
	Err    error
}

func (e *Error) Error() string { return fmt.Sprintf("migrate: %s: %v", e.State, e.Err) }
func (e *Error) Unwrap() error { return e.Err }
