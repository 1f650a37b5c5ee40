package qemu

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"github.com/lmctl/lmctl/internal/hypervisor/nics"
	"github.com/lmctl/lmctl/migrate/announce"
)

// cards describes the guest's cards with all that is known of them by now.
func (v *vm) cards() ([]announce.NIC, error) {
	v.mu.Lock()
	learners, brought := v.learners, v.rec.Cards
	v.mu.Unlock()
	cards, err := v.defined()
	if err != nil {
		return nil, err
	}
	nics.Complete(cards, learners, brought)
	return cards, nil
}

// defined describes the guest's cards by the definition.
func (v *vm) defined() ([]announce.NIC, error) {
	cards := make([]announce.NIC, len(v.def.NICs))
	for i := range v.def.NICs {
		var err error
		if cards[i], err = v.card(i); err != nil {
			return nil, err
		}
	}
	return cards, nil
}

// card describes a card by the definition.
func (v *vm) card(i int) (announce.NIC, error) {
	def := &v.def.NICs[i]
	mac, err := net.ParseMAC(def.MAC)
	if err != nil {
		return announce.NIC{}, err
	}
	nic := announce.NIC{Bridge: def.Bridge, Tap: tapName(v.def.UUID, i), MAC: mac}
	for _, text := range def.Addresses {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return announce.NIC{}, err
		}
		nic.Addresses = append(nic.Addresses, addr)
	}
	return nic, nil
}

// learn begins to gather the addresses of a guest that runs here.
func (v *vm) learn() {
	cards, err := v.defined()
	if err != nil {
		v.d.log.Warn("learn the guest's addresses", "guest", v.def.Name, "error", err)
		return
	}
	learners := nics.Learn(v.d.ctx, v.d.log, v.def.Name, cards)
	v.mu.Lock()
	v.learners = learners
	v.mu.Unlock()
}

// unlearn ends the gathering of addresses.
func (v *vm) unlearn() error {
	v.mu.Lock()
	learners := v.learners
	v.learners = nil
	v.mu.Unlock()
	return learners.Close()
}

// Announce tells the network where the cards of a guest of this host are, and
// returns the number of addresses announced.
func (d *Driver) Announce(ctx context.Context, name string) (int, error) {
	v, err := d.lookup(name)
	if err != nil {
		return 0, err
	}
	return v.announce(ctx)
}

func (v *vm) announce(ctx context.Context) (int, error) {
	if len(v.def.NICs) == 0 {
		return 0, nil
	}
	cards, err := v.cards()
	if err != nil {
		return 0, fmt.Errorf("announce guest %s: %w", v.def.Name, err)
	}
	n, err := v.d.cfg.Announce(ctx, cards)
	if err != nil {
		return n, fmt.Errorf("announce guest %s: %w", v.def.Name, err)
	}
	return n, nil
}

// catch begins to keep what comes for the guest's cards.
func (g *Guest) catch() error {
	cards, err := g.v.defined()
	if err != nil {
		return err
	}
	g.caught = nics.Catch(g.v.d.log, g.Name(), cards)
	return nil
}

// uncatch ends what catch began.
func (g *Guest) uncatch() error {
	err := g.caught.Close()
	g.caught = nil
	return err
}

// Forward sends the frames on that came here for the stopped guest, and those
// that still come until ctx is done. There are none to send if this Guest was
// not the one that suspended it.
func (g *Guest) Forward(ctx context.Context) (int, error) {
	frames, err := g.caught.Forward(ctx, g.inst.proc.id.PID, g.pidfd)
	if err != nil {
		return frames, fmt.Errorf("forward what came for guest %s: %w", g.Name(), err)
	}
	return frames, nil
}
