package qemu

import (
	"context"
	"fmt"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/migrate"
)

var _ migrate.Host = (*Driver)(nil)

// Prepare checks that this host can take the offered guest and makes its
// shell: a QEMU that waits for the guest's state, with all of its memory holes
// and its network not connected. What this host lacks is a *migrate.Refusal
// with every reason. On an error nothing is left.
func (d *Driver) Prepare(ctx context.Context, offer migrate.Offer) (migrate.Shell, error) {
	s, err := d.prepare(ctx, offer)
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (d *Driver) prepare(ctx context.Context, offer migrate.Offer) (*Shell, error) {
	b, def, err := parseBundle(offer.Definition)
	if err != nil {
		return nil, refusal("the guest's description cannot be read: %v", err)
	}
	if err := matchOffer(offer, def); err != nil {
		return nil, err
	}
	if err := matchBlocks(offer, def); err != nil {
		return nil, err
	}
	run, checks := d.examine(ctx, b, def)
	if err := checks.Refusal(); err != nil {
		return nil, err
	}
	v := d.newVM(def)
	v.rec = record{Run: run, Incoming: true, Cards: b.Cards}
	v.state = hypervisor.StateIncoming
	done, err := v.begin("incoming migration")
	if err != nil {
		return nil, err
	}
	if err := d.add(v); err != nil {
		return nil, refusal("guest %s cannot come here: %v", def.Name, err)
	}
	s, err := v.buildShell(ctx, b, done)
	if err != nil {
		done()
		return nil, fmt.Errorf("prepare guest %s: %w", def.Name, err)
	}
	return s, nil
}

func refusal(format string, args ...any) *migrate.Refusal {
	return &migrate.Refusal{Reasons: []string{fmt.Sprintf(format, args...)}}
}
