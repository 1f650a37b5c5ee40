// Package nics does for the network cards of a guest, whatever its hypervisor,
// what a migration needs: it learns their addresses, and keeps what comes for
// them while the guest stands still.
package nics

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"

	"github.com/lmctl/lmctl/migrate/announce"
)

// Learners gather the addresses of a guest's cards from what the guest sends.
type Learners struct{ byMAC map[string]*announce.Learner }

// Learn begins to gather. A card on which that fails is announced with what is
// known of it otherwise.
func Learn(ctx context.Context, log *slog.Logger, guest string, cards []announce.NIC) *Learners {
	l := &Learners{byMAC: make(map[string]*announce.Learner)}
	for _, card := range cards {
		learner, err := announce.Start(ctx, card.Tap, card.MAC)
		if err != nil {
			log.Warn("learn the guest's addresses", "guest", guest, "card", card.MAC, "error", err)
			continue
		}
		l.byMAC[card.MAC.String()] = learner
	}
	return l
}

// Known is what was learnt of the card with a MAC.
func (l *Learners) Known(mac string) (addresses []netip.Addr, router bool) {
	if l == nil || l.byMAC[mac] == nil {
		return nil, false
	}
	return l.byMAC[mac].Addresses(), l.byMAC[mac].Router()
}

// Close ends the gathering.
func (l *Learners) Close() error {
	if l == nil {
		return nil
	}
	var errs []error
	for _, learner := range l.byMAC {
		errs = append(errs, learner.Close())
	}
	return errors.Join(errs...)
}
