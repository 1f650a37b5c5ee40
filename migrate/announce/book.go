package announce

import (
	"net/netip"
	"slices"
	"time"
)

// maxAddresses is how many addresses of each family a book holds.
const maxAddresses = 16

// trialTime is how long an address that the guest tries must stay undisputed:
// duplicate address detection takes up to a second's random delay and a second
// (RFC 4862, section 5.4.2, with the defaults of RFC 4861, section 10).
const trialTime = 2 * time.Second

// book holds a guest's addresses, by family, the one seen last at the end.
type book struct {
	families [2][]entry
	xid      uint32 // of the DHCP request that waits for its answer
	asked    bool
	routes   bool
}

type entry struct {
	addr netip.Addr
	from time.Time // the guest's own from then on
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// add enters what a frame said at the time now.
func (k *book) add(s sighting, now time.Time) {
	if s.gone.IsValid() {
		k.remove(s.gone)
	}
	if s.uses.IsValid() {
		k.put(s.uses, now)
	}
	if s.tries.IsValid() {
		k.put(s.tries, now.Add(trialTime))
	}
	if s.asked {
		k.xid, k.asked = s.xid, true
	}
	if s.granted.IsValid() && k.asked && k.xid == s.xid {
		k.asked = false
		k.put(s.granted, now)
	}
	k.routes = k.routes || s.routes
}

func (k *book) put(a netip.Addr, from time.Time) {
	f := &k.families[family(a)]
	if i := k.find(a); i >= 0 {
		if old := (*f)[i].from; old.Before(from) {
			from = old
		}
		*f = slices.Delete(*f, i, i+1)
	} else if len(*f) == maxAddresses {
		*f = slices.Delete(*f, 0, 1)
	}
	*f = append(*f, entry{addr: a, from: from})
}

func (k *book) remove(a netip.Addr) {
	f := &k.families[family(a)]
	if i := k.find(a); i >= 0 {
		*f = slices.Delete(*f, i, i+1)
	}
}

func (k *book) find(a netip.Addr) int {
	return slices.IndexFunc(k.families[family(a)], func(e entry) bool { return e.addr == a })
}

// addresses lists those that are the guest's at the time now, IPv4 first, in
// ascending order.
func (k *book) addresses(now time.Time) []netip.Addr {
	var list []netip.Addr
	for _, f := range k.families {
		for _, e := range f {
			if !e.from.After(now) {
				list = append(list, e.addr)
			}
		}
	}
	slices.SortFunc(list, netip.Addr.Compare)
	return list
}
