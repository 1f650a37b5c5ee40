package libvirt

import (
	"net/netip"
	"slices"

	"github.com/lmctl/lmctl/migrate/announce"
)

// cardFacts is what is known of a card beside the domain's XML.
type cardFacts struct {
	Addresses []netip.Addr `json:"addresses,omitempty"`
	Router    bool         `json:"router,omitempty"` // the guest is an IPv6 router
}

// cards describes the domain's cards with all that is known of them by now.
func (g *domain) cards() []announce.NIC {
	g.mu.Lock()
	cards, learners, brought := slices.Clone(g.facts.cards), g.learners, g.brought
	g.mu.Unlock()
	for i := range cards {
		card := &cards[i]
		more := brought[card.MAC.String()]
		learnt, router := learners.Known(card.MAC.String())
		card.Router = more.Router || router
		for _, a := range slices.Concat(more.Addresses, learnt) {
			if !slices.Contains(card.Addresses, a) {
				card.Addresses = append(card.Addresses, a)
			}
		}
	}
	return cards
}
