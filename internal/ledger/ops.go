package ledger

import (
	"context"
	"errors"
	"fmt"

	"github.com/lmctl/lmctl/migrate"
)

// Begin implements migrate.SourceLedger.
func (l *Ledger) Begin(ctx context.Context, h migrate.Handover) error {
	if err := l.check(h, h.Source); err != nil {
		return err
	}
	return l.apply(ctx, OpBegin, h, false)
}

// HandOver implements migrate.SourceLedger. Once it writes, ctx cannot
// interrupt it.
func (l *Ledger) HandOver(ctx context.Context, h migrate.Handover) error {
	err := l.check(h, h.Source)
	if err == nil {
		err = l.apply(ctx, OpHandOver, h, true)
	}
	if err != nil && !errors.Is(err, errUncertain) {
		return fmt.Errorf("%w: %w", migrate.ErrNotHandedOver, err)
	}
	return err
}

// Reclaim implements migrate.SourceLedger.
func (l *Ledger) Reclaim(ctx context.Context, h migrate.Handover) error {
	return l.apply(ctx, OpReclaim, h, true)
}

// Cancel implements migrate.SourceLedger. The record of Begin is no more
// durable than this one, and both say that the source owns the guest.
func (l *Ledger) Cancel(ctx context.Context, h migrate.Handover) error {
	return l.apply(ctx, OpCancel, h, false)
}

// Forget implements migrate.SourceLedger.
func (l *Ledger) Forget(ctx context.Context, h migrate.Handover) error {
	return l.apply(ctx, OpForget, h, true)
}

// Prepare implements migrate.DestinationLedger. What speaks against it is a
// *migrate.Refusal.
func (l *Ledger) Prepare(ctx context.Context, h migrate.Handover) error {
	if err := l.check(h, h.Destination); err != nil {
		return err
	}
	err := l.apply(ctx, OpPrepare, h, true)
	var state *StateError
	if errors.As(err, &state) {
		return &migrate.Refusal{Reasons: []string{fmt.Sprintf("host %s cannot take guest %s: %s", l.host, h.Guest, state.Reason)}}
	}
	return err
}

// Accept implements migrate.DestinationLedger.
func (l *Ledger) Accept(ctx context.Context, h migrate.Handover) error {
	return l.apply(ctx, OpAccept, h, false)
}

// Own implements migrate.DestinationLedger.
func (l *Ledger) Own(ctx context.Context, h migrate.Handover) error {
	return l.apply(ctx, OpOwn, h, true)
}

// Withdraw implements migrate.DestinationLedger. After a restart of the host
// nobody can know that no vCPU ran, and it fails.
func (l *Ledger) Withdraw(ctx context.Context, h migrate.Handover) error {
	if err := l.check(h, h.Destination); err != nil {
		return err
	}
	return l.apply(ctx, OpWithdraw, h, true)
}

// Drop implements migrate.DestinationLedger.
func (l *Ledger) Drop(ctx context.Context, h migrate.Handover) error {
	return l.apply(ctx, OpDrop, h, true)
}

// Define makes a new guest this host's, at epoch 1.
func (l *Ledger) Define(ctx context.Context, guest, uuid string) error {
	return l.apply(ctx, OpDefine, migrate.Handover{Guest: guest, UUID: uuid}, true)
}

// Undefine notes that the operator has removed a guest.
func (l *Ledger) Undefine(ctx context.Context, guest string) error {
	return l.apply(ctx, OpUndefine, migrate.Handover{Guest: guest}, true)
}

// Contest notes that another host owns the guest by a higher right, although
// it has run here.
func (l *Ledger) Contest(ctx context.Context, guest string) error {
	return l.apply(ctx, OpContest, migrate.Handover{Guest: guest}, true)
}

// Yield gives the guest up for a host that owns it at the given epoch.
func (l *Ledger) Yield(ctx context.Context, guest string, epoch uint64) error {
	r := l.Get(guest)
	return l.apply(ctx, OpYield, migrate.Handover{Guest: guest, UUID: r.UUID, Epoch: epoch}, true)
}

// Claim is the operator's word that a guest is this host's. Its epoch is higher
// than the one here and the given one, the highest that is known of others.
func (l *Ledger) Claim(ctx context.Context, guest, uuid string, others uint64) error {
	return l.apply(ctx, OpClaim, migrate.Handover{Guest: guest, UUID: uuid, Epoch: others}, true)
}

// Discard is the operator's word that nothing of a guest that was on its way
// here, or whose record is damaged, is to be kept.
func (l *Ledger) Discard(ctx context.Context, guest string) error {
	return l.apply(ctx, OpDiscard, migrate.Handover{Guest: guest}, true)
}

// check says why a handover cannot be one of this host's.
func (l *Ledger) check(h migrate.Handover, here string) error {
	if err := checkHandover(h); err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	if here != l.host {
		return fmt.Errorf("ledger: handover %s of guest %s: host %s is to note it, but this is host %s", h.ID, h.Guest, here, l.host)
	}
	return nil
}
