package migrate

import (
	"context"
	"errors"
	"slices"
)

// Mode is a way to get a guest's memory across.
type Mode string

// The modes.
const (
	// Direct: the engine copies the memory out of the files that the hypervisor
	// maps, by the bitmaps of a tracker.
	Direct Mode = "direct"
	// Relay: the hypervisor copies the memory itself, through the engine's
	// connections; the engine bounds its passes.
	Relay Mode = "relay"
)

// choose settles the mode of the migration.
func (m *source) choose(ctx context.Context) error {
	if m.opts.Mode != Relay {
		err := m.job.Guest.Movable(ctx)
		if err == nil {
			m.report.Mode = Direct
			return nil
		}
		var refusal *Refusal
		if m.opts.Mode == Direct || !errors.As(err, &refusal) {
			return err
		}
		return m.chooseRelay(ctx, refusal.Reasons)
	}
	return m.chooseRelay(ctx, nil)
}

// chooseRelay has the hypervisor copy the memory. NotDirect is why the engine
// does not, empty if that was asked for.
func (m *source) chooseRelay(ctx context.Context, notDirect []string) error {
	relayed, can := m.job.Guest.(RelayGuest)
	if !can {
		if len(notDirect) == 0 {
			notDirect = []string{"guests of this hypervisor move in direct mode only; leave the mode to lmctl"}
		}
		return &Refusal{Reasons: notDirect}
	}
	if err := relayed.Relayable(ctx); err != nil {
		var refusal *Refusal
		if !errors.As(err, &refusal) {
			return err
		}
		reasons := slices.Clone(refusal.Reasons)
		for _, r := range notDirect {
			if !slices.Contains(reasons, r) {
				reasons = append(reasons, r)
			}
		}
		return &Refusal{Reasons: reasons}
	}
	if m.opts.Verify {
		why := "in relay mode the memory is not the agent's to read, and cannot be verified; migrate without verification"
		return &Refusal{Reasons: append([]string{why}, notDirect...)}
	}
	m.report.Mode, m.relayed = Relay, relayed
	m.log.Info("the hypervisor copies the memory itself", "reasons", notDirect)
	return nil
}

// by does what the mode asks for.
func (m *source) by(direct, relay func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		if m.relayed != nil {
			return relay(ctx)
		}
		return direct(ctx)
	}
}
