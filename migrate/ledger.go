package migrate

import (
	"context"
	"errors"
)

// ErrNotHandedOver is in the chain of HandOver's error when the source still
// owns the guest, for certain.
var ErrNotHandedOver = errors.New("the guest was not handed over")

// Handover is one passing of a guest from one host to another. ID is fresh for
// each attempt; Epoch is the one that the guest has once it has passed.
type Handover struct {
	ID          string `json:"id"`
	Guest       string `json:"guest"`
	UUID        string `json:"uuid"`
	Source      string `json:"source"`
	Destination string `json:"destination"`
	Epoch       uint64 `json:"epoch"`
}

// SourceLedger is the source's side of the commit. Without a cluster it is a
// durable record on the source; with one, a compare-and-swap of the guest's
// owner and epoch in the cluster database.
type SourceLedger interface {
	// Begin notes that the guest is about to be suspended for h, so that an
	// agent that dies and comes back knows that a stopped guest is to run on.
	// It need not survive the host, only the agent.
	Begin(ctx context.Context, h Handover) error
	// HandOver is the commit: when it returns nil, the destination owns the
	// guest, durably, and the source must never run it again unless the
	// destination hands it back. When it returns ErrNotHandedOver the source
	// still owns it, for certain. After any other error the guest is in doubt.
	HandOver(ctx context.Context, h Handover) error
	// Reclaim takes the guest back after the destination has said, durably,
	// that it never ran it and never will. The guest gets a fresh epoch.
	Reclaim(ctx context.Context, h Handover) error
	// Cancel ends h before any HandOver: the source owns the guest and h can
	// never be committed any more.
	Cancel(ctx context.Context, h Handover) error
	// Forget drops what the source knows of the guest, once the destination has
	// acknowledged durably that it has it.
	Forget(ctx context.Context, h Handover) error
}

// DestinationLedger is the destination's side.
type DestinationLedger interface {
	// Prepare notes durably that a shell exists for h, before the destination
	// says that it is ready.
	Prepare(ctx context.Context, h Handover) error
	// Accept notes that the vCPUs may run from now on. It must survive the
	// agent, but need not yet survive the host: it stands in the guest's
	// downtime.
	Accept(ctx context.Context, h Handover) error
	// Own makes the ownership durable. After it the source may be told to
	// forget the guest.
	Own(ctx context.Context, h Handover) error
	// Withdraw notes durably that h was not and will never be run here. The
	// caller knows for certain that no vCPU ran, also if Accept was called. It
	// fails after Own.
	Withdraw(ctx context.Context, h Handover) error
	// Drop removes what was noted for h at a destination that need not answer
	// for it any more.
	Drop(ctx context.Context, h Handover) error
}
