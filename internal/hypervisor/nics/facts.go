package nics

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/lmctl/lmctl/migrate/announce"
)

// Facts is what is known of a card beside the guest's definition. It goes with
// the guest from host to host.
type Facts struct {
	Addresses []netip.Addr `json:"addresses,omitempty"`
	Router    bool         `json:"router,omitempty"` // the guest is an IPv6 router
}

// maxAddresses bounds those of one card.
const maxAddresses = 256

// Check says what is wrong with facts that another host has sent: each must be
// of a card that is known by its MAC, with addresses that a card can have.
func Check(facts map[string]Facts, known func(mac string) bool) error {
	for text, card := range facts {
		mac, err := net.ParseMAC(text)
		if err != nil || !known(mac.String()) || len(card.Addresses) > maxAddresses {
			return fmt.Errorf("%d addresses of a card %q", len(card.Addresses), text)
		}
		for _, a := range card.Addresses {
			if !a.IsValid() || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() {
				return fmt.Errorf("address %s of card %s", a, text)
			}
		}
	}
	return nil
}

// Complete adds to cards what was learnt here and what the host knew where the
// guest came from, by MAC.
func Complete(cards []announce.NIC, learners *Learners, brought map[string]Facts) {
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
}

// FactsOf is what the next host is to know of cards, by MAC.
func FactsOf(cards []announce.NIC) map[string]Facts {
	facts := make(map[string]Facts, len(cards))
	for _, c := range cards {
		facts[c.MAC.String()] = Facts{Addresses: c.Addresses, Router: c.Router}
	}
	return facts
}
