package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/ledger"
	"github.com/lmctl/lmctl/migrate"
)

// The pauses between two attempts to settle a guest: short at first, since the
// other agent often just restarts, and never so long that an operator would
// wait for it.
const (
	settleFirst = 100 * time.Millisecond
	settleLast  = 5 * time.Second
)

// settler brings every guest whose ownership is open to a decision, by the
// rules of package ledger: it asks the other host until that answers, and does
// what follows.
type settler struct {
	a *Agent

	mu        sync.Mutex
	guests    map[string]*openGuest
	connected bool // loops may ask other hosts
}

// openGuest is what the settler keeps of one guest.
type openGuest struct {
	act sync.Mutex // held while something is being done about the guest

	// Guarded by the settler's mu.
	decision ledger.Decision
	shell    *migrate.Incoming // left by the receiver
	looping  bool
	wake     chan struct{}
}

func newSettler(a *Agent) *settler {
	return &settler{a: a, guests: make(map[string]*openGuest)}
}

func (s *settler) guest(name string) *openGuest {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.guests[name]
	if g == nil {
		g = &openGuest{wake: make(chan struct{}, 1)}
		s.guests[name] = g
	}
	return g
}

// begin settles what can be settled without asking, when the agent starts.
func (s *settler) begin(ctx context.Context) {
	s.a.knowAll(ctx)
	names := make(map[string]bool)
	for _, r := range s.a.ledger.List() {
		names[r.Guest] = true
	}
	for _, info := range s.a.driver.List() {
		names[info.Name] = true
	}
	restored := s.a.connected() && s.restoreDefinitions(ctx, slog.LevelError)
	for name := range names {
		d := s.settle(ctx, name, nil)
		s.a.log.Debug("guest looked at", "guest", name, "action", d.Action, "reason", d.Reason)
	}
	s.forgetDefinitions()
	if !restored {
		s.a.wg.Go(func() { s.restoreLater(s.a.life) })
	}
}

// The pauses between two attempts to define guests again.
const (
	restoreFirst = 500 * time.Millisecond
	restoreLast  = 30 * time.Second
)

// restoreLater defines guests again as soon as that is possible, when the agent came
// up before its hypervisor, or that could not do it.
func (s *settler) restoreLater(ctx context.Context) {
	level := slog.LevelError
	for pause := restoreFirst; s.a.awaitConnection(ctx) == nil; pause = min(2*pause, restoreLast) {
		s.a.knowAll(ctx)
		done := s.restoreDefinitions(ctx, level)
		s.forgetDefinitions()
		level = slog.LevelDebug // said once, it is known
		if done {
			return
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

// restoreDefinitions defines the guests of this host again that the driver has
// forgotten, and says whether nothing is left to be tried. What fails is logged at a
// level.
func (s *settler) restoreDefinitions(ctx context.Context, level slog.Level) (done bool) {
	done = true
	for _, r := range s.a.ledger.List() {
		if ctx.Err() != nil {
			return false
		}
		if err := s.restoreOwned(r.Guest); err != nil {
			s.a.log.Log(ctx, level, "a guest of this host cannot be defined again", "guest", r.Guest, "error", err)
			done = done && errors.Is(err, errNotKept)
		}
	}
	return done
}

// restoreOwned is restoreDefinition of a guest if it is this host's.
func (s *settler) restoreOwned(name string) error {
	g := s.guest(name)
	g.act.Lock()
	defer g.act.Unlock()
	if s.a.ledger.Owns(name) != nil {
		return nil
	}
	return s.restoreDefinition(name)
}

// forgetDefinitions removes the definitions of guests that came here and are
// like any others now, or did not come.
func (s *settler) forgetDefinitions() {
	for _, name := range s.a.kept.names() {
		s.forgetDefinition(name)
	}
}

// forgetDefinition removes a definition that is not needed any more, so that a guest
// that another hand removes is not brought back.
func (s *settler) forgetDefinition(name string) {
	if s.a.inbound.busy(name) {
		return // it comes here
	}
	switch s.a.ledger.Get(name).State {
	case ledger.None, ledger.Gone:
	case ledger.Owned:
		info, err := s.a.driver.Get(name)
		if err != nil || info.Arriving || info.State == hypervisor.StateIncoming || info.State == hypervisor.StateUnreachable {
			return // it may yet be lost
		}
	default:
		return
	}
	if err := s.a.kept.forget(name); err != nil {
		s.a.log.Warn("a definition that is not needed any more stays", "guest", name, "error", err)
	}
}

// connect lets the loops begin: the other hosts can reach this one.
func (s *settler) connect() {
	s.mu.Lock()
	s.connected = true
	names := make([]string, 0, len(s.guests))
	for name := range s.guests {
		names = append(names, name)
	}
	s.mu.Unlock()
	for _, name := range names {
		s.kick(name)
	}
	s.a.wg.Go(func() { s.follow(s.a.life) })
}

// follow looks at guests again that could not be reached, once they can be.
func (s *settler) follow(ctx context.Context) {
	unreachable := make(map[string]bool)
	for info := range s.a.driver.Watch(ctx) {
		s.a.know(ctx, info.Name)
		s.forgetDefinition(info.Name)
		was := unreachable[info.Name]
		unreachable[info.Name] = info.State == hypervisor.StateUnreachable
		switch {
		case info.State == hypervisor.StateUnreachable:
		case was:
			s.kick(info.Name)
			fallthrough
		default:
			delete(unreachable, info.Name)
		}
	}
}

// undecided is the receiver's Undecided.
func (s *settler) undecided(in migrate.Incoming) {
	g := s.guest(in.Handover.Guest)
	s.mu.Lock()
	g.shell = &in
	s.mu.Unlock()
	s.a.log.Warn("the source was lost before it said whether the guest is ours", "guest", in.Handover.Guest, "migration", in.Handover.ID, "source", in.Handover.Source)
	s.kick(in.Handover.Guest)
}

// doubt is what an operator has to know about a guest that is not settled, or
// nothing.
func (s *settler) doubt(guest string) (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.guests[guest]
	if g == nil {
		return "", false
	}
	switch g.decision.Action {
	case ledger.Ask, ledger.Wait:
		// A guest that is this host's for certain only waits for its turn.
		return g.decision.Reason, s.a.ledger.Owns(guest) != nil
	case ledger.Doubt:
		return g.decision.Reason, true
	}
	return "", false
}

// kick looks at a guest again soon, and keeps looking while it is open.
func (s *settler) kick(name string) {
	g := s.guest(name)
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case g.wake <- struct{}{}:
	default:
	}
	if g.looping || !s.connected || s.a.life.Err() != nil {
		return
	}
	g.looping = true
	s.a.wg.Go(func() { s.loop(s.a.life, name, g) })
}

// loop settles a guest until nothing is open.
func (s *settler) loop(ctx context.Context, name string, g *openGuest) {
	pause := settleFirst
	for {
		select {
		case <-g.wake:
		default:
		}
		d := s.ask(ctx, name)
		s.mu.Lock()
		open := d.Action == ledger.Ask || d.Action == ledger.Wait || d.Action == ledger.Doubt && s.otherHost(name) != ""
		if !open && len(g.wake) == 0 || ctx.Err() != nil {
			g.looping = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
			pause = min(2*pause, settleLast)
		case <-g.wake:
			timer.Stop()
			pause = settleFirst
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

// otherHost is the host at the other end of the handover that a guest's record
// is about, or nothing.
func (s *settler) otherHost(name string) string {
	h := s.a.ledger.Get(name).Handover
	switch {
	case h == nil:
		return ""
	case h.Source == s.a.cfg.Name:
		return h.Destination
	}
	return h.Source
}

// ask settles a guest with the other host's statement, if it is needed and can
// be had.
func (s *settler) ask(ctx context.Context, name string) ledger.Decision {
	d := s.settle(ctx, name, nil)
	other := s.otherHost(name)
	if d.Action != ledger.Ask && d.Action != ledger.Wait && d.Action != ledger.Doubt || other == "" {
		return d
	}
	peer, err := s.a.peers.settle(ctx, other, s.say(name))
	if err != nil {
		s.a.log.Debug("cannot ask about a guest", "guest", name, "peer", other, "error", err)
		return d
	}
	return s.settle(ctx, name, peer)
}

// say is this host's statement about a guest.
func (s *settler) say(name string) ledger.Statement {
	return ledger.Say(s.a.ledger.Get(name), s.facts(name))
}

func (s *settler) facts(name string) ledger.Facts {
	// Whether a migration is under way is looked at last: one that ends in
	// between has then left its record behind.
	c, shell := s.a.copyOf(name)
	return ledger.Facts{Host: s.a.cfg.Name, Boot: s.a.ledger.Boot(), Copy: c, Shell: shell, Foreign: s.a.foreign(),
		Busy: s.a.moves.busy(name) || s.a.inbound.busy(name)}
}

// maxActions bounds what one look at a guest may lead to: each action brings
// its record closer to rest.
const maxActions = 6

// settle does whatever is to be done about a guest, given what the other host
// says or nil, and returns what is left.
func (s *settler) settle(ctx context.Context, name string, peer *ledger.Statement) ledger.Decision {
	g := s.guest(name)
	g.act.Lock()
	defer g.act.Unlock()
	return s.settleHeld(ctx, name, peer, g)
}

// trySettle is settle for a caller that cannot wait for its turn. It says
// whether it was its turn.
func (s *settler) trySettle(ctx context.Context, name string, peer *ledger.Statement) bool {
	g := s.guest(name)
	if !g.act.TryLock() {
		return false
	}
	defer g.act.Unlock()
	s.settleHeld(ctx, name, peer, g)
	return true
}

// settleHeld is settle with g.act held.
func (s *settler) settleHeld(ctx context.Context, name string, peer *ledger.Statement, g *openGuest) ledger.Decision {
	var d ledger.Decision
	for range maxActions {
		// The facts before the record, for the same reason as above.
		facts := s.facts(name)
		record := s.a.ledger.Get(name)
		d = ledger.Decide(record, facts, peer)
		if !acts(d.Action) {
			break
		}
		log := s.a.log.With("guest", name, "action", string(d.Action), "reason", d.Reason)
		if err := s.carryOut(ctx, d.Action, record, facts, peer, g); err != nil {
			level := slog.LevelError
			if busy := (*hypervisor.BusyError)(nil); errors.As(err, &busy) {
				level = slog.LevelDebug // the end of that is waited for
			}
			log.Log(ctx, level, "settling a guest failed", "error", err)
			d = ledger.Decision{Action: ledger.Wait, Reason: fmt.Sprintf("%s, but: %v", d.Reason, err)}
			break
		}
		log.Info("settled a step")
		if d.Action == ledger.Withdraw {
			peer = nil // whether the other host knows of it has to be asked afresh
		}
	}
	s.forgetDefinition(name)
	record := s.a.ledger.Get(name)
	s.a.moves.settled(record, s.a.cfg.Name)
	if record.State == ledger.None || record.State == ledger.Gone {
		s.a.metrics.left(name)
	}
	s.note(g, name, d)
	return d
}

func acts(a ledger.Action) bool {
	switch a {
	case ledger.Rest, ledger.Wait, ledger.Ask, ledger.Doubt:
		return false
	}
	return true
}

func (s *settler) note(g *openGuest, name string, d ledger.Decision) {
	s.mu.Lock()
	before := g.decision
	g.decision = d
	s.mu.Unlock()
	if d != before && (d.Action == ledger.Doubt || d.Action == ledger.Ask) {
		s.a.log.LogAttrs(context.Background(), slog.LevelWarn, "guest is in doubt", slog.String("guest", name), slog.String("reason", d.Reason))
	}
}
