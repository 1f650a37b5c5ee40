package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/migrate/announce"
)

// cardFacts is what is known of a card beside its definition.
type cardFacts struct {
	Addresses []netip.Addr `json:"addresses,omitempty"`
	Router    bool         `json:"router,omitempty"` // the guest is an IPv6 router
}

// cards describes the guest's cards with all that is known of them by now.
func (v *vm) cards() ([]announce.NIC, error) {
	v.mu.Lock()
	learners, brought := slices.Clone(v.learners), v.rec.Cards
	v.mu.Unlock()
	nics := make([]announce.NIC, len(v.def.NICs))
	for i := range v.def.NICs {
		nic, err := v.card(i)
		if err != nil {
			return nil, err
		}
		more := brought[nic.MAC.String()]
		nic.Router = more.Router
		if i < len(learners) && learners[i] != nil {
			more.Addresses = append(slices.Clone(more.Addresses), learners[i].Addresses()...)
			nic.Router = nic.Router || learners[i].Router()
		}
		for _, a := range more.Addresses {
			if !slices.Contains(nic.Addresses, a) {
				nic.Addresses = append(nic.Addresses, a)
			}
		}
		nics[i] = nic
	}
	return nics, nil
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

// learn begins to gather the addresses of a guest that runs here. A card on
// which that fails is announced with what is known of it otherwise.
func (v *vm) learn() {
	learners := make([]*announce.Learner, len(v.def.NICs))
	for i := range v.def.NICs {
		nic, err := v.card(i)
		if err == nil {
			learners[i], err = announce.Start(v.d.ctx, nic.Tap, nic.MAC)
		}
		if err != nil {
			v.d.log.Warn("learn the guest's addresses", "guest", v.def.Name, "card", i, "error", err)
		}
	}
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
	var errs []error
	for _, l := range learners {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	return errors.Join(errs...)
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
	nics, err := v.cards()
	if err != nil {
		return 0, fmt.Errorf("announce guest %s: %w", v.def.Name, err)
	}
	n, err := v.d.cfg.Announce(ctx, nics)
	if err != nil {
		return n, fmt.Errorf("announce guest %s: %w", v.def.Name, err)
	}
	return n, nil
}

// catch begins to keep what comes for the guest's cards. A card on which that
// fails loses what comes during the pause, as a link would that was pulled for
// as long; the migration goes on.
func (g *Guest) catch() {
	for i := range g.v.def.NICs {
		nic, err := g.v.card(i)
		var s *announce.Stranded
		if err == nil {
			s, err = announce.OpenStranded(nic)
		}
		if err != nil {
			g.v.d.log.Warn("what comes for the guest while it stands still will be lost", "guest", g.Name(), "card", i, "error", err)
			continue
		}
		g.stranded = append(g.stranded, s)
	}
}

// caught says from when on the guest has received nothing.
func (g *Guest) caught(stopped time.Time) {
	for _, s := range g.stranded {
		s.Stopped(stopped)
	}
}

// uncatch ends what catch began.
func (g *Guest) uncatch() error {
	var errs []error
	for _, s := range g.stranded {
		errs = append(errs, s.Close())
	}
	g.stranded = nil
	return errors.Join(errs...)
}

// Forward sends the frames on that came here for the stopped guest, and those
// that still come until ctx is done. There are none to send if this Guest was
// not the one that suspended it.
func (g *Guest) Forward(ctx context.Context) (int, error) {
	type outcome struct {
		frames int
		err    error
	}
	results := make(chan outcome)
	for _, s := range g.stranded {
		go func() {
			unread := g.unread(s)
			n, err := s.Forward(ctx)
			err = errors.Join(unread, err)
			if d := s.Dropped(); err == nil && d > 0 {
				err = fmt.Errorf("%d frames could not be sent", d)
			}
			results <- outcome{n, err}
		}()
	}
	frames, errs := 0, []error(nil)
	for range g.stranded {
		r := <-results
		frames += r.frames
		errs = append(errs, r.err)
	}
	if err := errors.Join(errs...); err != nil {
		return frames, fmt.Errorf("forward what came for guest %s: %w", g.Name(), err)
	}
	return frames, nil
}

// unread has those frames sent on too that QEMU left in its tap before the
// stop.
func (g *Guest) unread(s *announce.Stranded) (err error) {
	theirs, err := announce.TapFDs(g.inst.proc.id.PID, s.Tap())
	if err != nil {
		return err
	}
	var ours []int
	defer func() {
		for _, fd := range ours {
			err = errors.Join(err, unix.Close(fd))
		}
	}()
	for _, fd := range theirs {
		dup, err := unix.PidfdGetfd(g.pidfd, fd, 0)
		if err != nil {
			return fmt.Errorf("duplicate descriptor %d of QEMU: %w", fd, err)
		}
		ours = append(ours, dup)
	}
	return s.Unread(ours...)
}
