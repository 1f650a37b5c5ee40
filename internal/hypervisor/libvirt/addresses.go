package libvirt

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"time"

	lv "github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"

	"github.com/lmctl/lmctl/internal/hypervisor/nics"
)

// Whence libvirt is asked for the addresses of a domain's cards:
// virDomainInterfaceAddressesSource.
const (
	fromLeases = 0 // that libvirt's own networks have given
	fromAgent  = 1 // in the guest
)

// askTimeout bounds a question after addresses: a guest agent may hang.
const askTimeout = 3 * time.Second

// cardFacts is what another host is to know of the domain's cards: what was
// learnt of them and what libvirt knows.
func (g *domain) cardFacts(ctx context.Context, l *link) map[string]nics.Facts {
	facts := nics.FactsOf(g.cards())
	g.mu.Lock()
	x := g.facts.xml
	g.mu.Unlock()
	sources := []uint32{fromLeases}
	if hasAgent(x) {
		sources = append(sources, fromAgent)
	}
	for _, source := range sources {
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		cards, err := call(ctx, l, func(l *link) ([]lv.DomainInterface, error) {
			return l.DomainInterfaceAddresses(g.ref(), source, 0)
		})
		cancel()
		if err != nil {
			// What the guest sends is learnt all the same.
			g.d.log.Debug("ask libvirt for the guest's addresses", "guest", g.name, "source", source, "error", err)
			continue
		}
		addAddresses(facts, cards)
	}
	return facts
}

// hasAgent says whether an agent in the guest has its channel open.
func hasAgent(x *libvirtxml.Domain) bool {
	return x != nil && x.Devices != nil && slices.ContainsFunc(x.Devices.Channels, func(c libvirtxml.DomainChannel) bool {
		return c.Target != nil && c.Target.VirtIO != nil && c.Target.VirtIO.Name == "org.qemu.guest_agent.0" && c.Target.VirtIO.State == "connected"
	})
}

// addAddresses adds those that other hosts can have of a card: not the guest's
// own, like that of its loopback device.
func addAddresses(facts map[string]nics.Facts, cards []lv.DomainInterface) {
	for _, c := range cards {
		if len(c.Hwaddr) != 1 {
			continue
		}
		mac, err := net.ParseMAC(c.Hwaddr[0])
		if err != nil {
			continue
		}
		card, ok := facts[mac.String()]
		if !ok {
			continue
		}
		for _, a := range c.Addrs {
			if ip, ok := unicast(a.Addr); ok && !slices.Contains(card.Addresses, ip) {
				card.Addresses = append(card.Addresses, ip)
			}
		}
		facts[mac.String()] = card
	}
}

// unicast reads an address that one card has for others to reach it by.
func unicast(text string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(text)
	a = a.Unmap().WithZone("")
	return a, err == nil && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLoopback()
}

// filterAddresses are those that a domain's own definition names for a card: as
// parameters of a network filter, the one place that it has for them.
func filterAddresses(i *libvirtxml.DomainInterface) []netip.Addr {
	if i.FilterRef == nil {
		return nil
	}
	var all []netip.Addr
	for _, p := range i.FilterRef.Parameters {
		if p.Name != "IP" && p.Name != "IPV6" {
			continue
		}
		if a, ok := unicast(p.Value); ok && !slices.Contains(all, a) {
			all = append(all, a)
		}
	}
	return all
}
