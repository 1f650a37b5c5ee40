package migrate

import (
	"context"
	"log/slog"
	"net"
	"time"
)

// Receiver takes guests on this host.
type Receiver struct {
	Name   string // this host's name
	Host   Host
	Ledger DestinationLedger
	Log    *slog.Logger
	// PeerTimeout is how long the source may be silent; 5 s by default.
	PeerTimeout time.Duration
	// Undecided takes over a shell that is ready but lost its source before
	// the word came. The owner of the Receiver asks the source's record, then
	// calls Finish or Withdraw.
	Undecided func(Incoming)
	// Observe, if set, is told of every change of state. It must not block.
	Observe func(Incoming, State)
}

// Incoming is a guest that is on its way to this host.
type Incoming struct {
	Handover Handover
	Shell    Shell
}

// Serve speaks the destination's side on one connection that peer, a host
// authenticated by its certificate, has opened. It returns when the connection
// has ended.
func (r *Receiver) Serve(ctx context.Context, conn net.Conn, peer string) error

// Finish runs a shell whose handover is certain: notes it, starts the vCPUs,
// makes the ownership durable and announces the guest.
func (r *Receiver) Finish(ctx context.Context, in Incoming) error

// Withdraw destroys a shell that is certain never to run and notes so.
func (r *Receiver) Withdraw(ctx context.Context, in Incoming) error
