package libvirt

import (
	"context"
	"slices"

	"github.com/lmctl/lmctl/internal/hypervisor/nics"
	"github.com/lmctl/lmctl/migrate/announce"
)

// cards describes the domain's cards with all that is known of them by now.
func (g *domain) cards() []announce.NIC {
	g.mu.Lock()
	cards, learners, brought := slices.Clone(g.facts.cards), g.learners, g.brought
	g.mu.Unlock()
	nics.Complete(cards, learners, brought)
	return cards
}

// cardsHere are the cards of a domain that has come from another host.
func (g *domain) cardsHere(ctx context.Context) ([]announce.NIC, error) {
	g.mu.Lock()
	offered := g.facts.offered
	g.mu.Unlock()
	if offered {
		l, err := g.d.conn.await(ctx)
		if err != nil {
			return nil, err
		}
		if err := g.look(ctx, l); err != nil {
			return nil, err
		}
	}
	return g.cards(), nil
}
