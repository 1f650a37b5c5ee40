package libvirt

import (
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
