package libvirt

import (
	"context"
	"errors"
	"fmt"
	"time"

	lv "github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/nics"
	"github.com/lmctl/lmctl/internal/hypervisor/queue"
)

// lookTimeout bounds a look at a domain.
const lookTimeout = 30 * time.Second

// meet finds the domains of a libvirtd that was just connected to, and follows
// what becomes of them.
func (d *Driver) meet(l *link) error {
	events, err := l.LifecycleEvents(context.Background())
	if err != nil {
		return fmt.Errorf("subscribe to its events: %w", err)
	}
	// The events are taken from now on and acted on after the list.
	listed := make(chan struct{})
	defer close(listed)
	todo := queue.New[lv.DomainEventLifecycleMsg]()
	d.wg.Go(func() {
		defer todo.Close()
		for e := range until(d.ctx, events) {
			if lv.DomainEventType(e.Event) == lv.DomainEventSuspended {
				d.hear(e.Dom.Name, happening{what: suspendedEvent, at: time.Now()})
			}
			todo.Put(e)
		}
	})
	d.wg.Go(func() {
		<-listed
		todo.All(d.ctx, func(e lv.DomainEventLifecycleMsg) { d.happened(l, e) })
	})
	doms, _, err := l.ConnectListAllDomains(1, 0)
	if err != nil {
		return fmt.Errorf("list its domains: %w", err)
	}
	there := make(map[*domain]bool)
	for _, dom := range doms {
		g := d.of(dom)
		there[g] = true
		g.tell(func() { g.lost = false })
		if err := g.look(d.ctx, l); err != nil {
			d.log.Warn("look at a domain", "guest", dom.Name, "error", err)
		}
		if err := g.leaveDisksAgain(d.ctx, l); err != nil {
			d.log.Warn("have a domain on its way here leave its disks", "guest", dom.Name, "error", err)
		}
	}
	var recalled error
	if !d.swept {
		if recalled = d.recall(); recalled != nil {
			d.log.Error("what libvirt may have forgotten", "error", recalled)
		}
	}
	for _, g := range d.all() {
		if there[g] {
			continue
		}
		if err := g.look(d.ctx, l); err != nil {
			d.log.Warn("a domain has gone", "guest", g.name, "error", err)
		}
	}
	d.wg.Go(func() { d.warm(l) })
	if !d.swept && recalled == nil {
		d.swept = true
		if err := d.sweep(); err != nil {
			d.log.Error("what an earlier agent left of its migrations", "error", err)
		}
	}
	return nil
}

// warm has libvirtd find out what its QEMU can do: it takes seconds the first
// time, which would be a migration's.
func (d *Driver) warm(l *link) {
	_, err := call(d.ctx, l, func(l *link) (string, error) {
		return l.ConnectGetDomainCapabilities(nil, nil, nil, nil, 0)
	})
	if err != nil {
		d.log.Debug("libvirt's capabilities", "error", err)
	}
}

// part notes that libvirtd cannot be asked any more.
func (d *Driver) part(cause error) {
	if d.ctx.Err() != nil {
		return
	}
	for _, g := range d.all() {
		g.mu.Lock()
		lost := g.lost
		g.mu.Unlock()
		if lost {
			continue
		}
		d.log.Warn("libvirtd cannot be reached", "guest", g.name, "error", cause)
		g.tell(func() { g.lost = true })
	}
}

// happened acts on a lifecycle event.
func (d *Driver) happened(l *link, e lv.DomainEventLifecycleMsg) {
	g := d.of(e.Dom)
	switch lv.DomainEventType(e.Event) {
	case lv.DomainEventStarted:
		g.mu.Lock()
		g.started = time.Now()
		g.mu.Unlock()
	case lv.DomainEventStopped:
		g.stopped(lv.DomainEventStoppedDetailType(e.Detail))
	}
	ctx, cancel := context.WithTimeout(d.ctx, lookTimeout)
	defer cancel()
	if err := g.look(ctx, l); err != nil && d.ctx.Err() == nil && !errors.Is(err, errDisconnected) {
		d.log.Warn("look at a domain", "guest", g.name, "error", err)
	}
}

// exitGrace is how long a process may take to end after libvirt has said that
// its domain has.
const exitGrace = 2 * time.Second

// stopped notes how a domain ended.
func (g *domain) stopped(detail lv.DomainEventStoppedDetailType) {
	g.mu.Lock()
	proc, intent := g.proc, g.intent
	g.intent = ""
	g.mu.Unlock()
	end := hypervisor.End{At: time.Now(), Cause: hypervisor.EndVanished}
	switch detail {
	case lv.DomainEventStoppedShutdown:
		end.Cause = hypervisor.EndPoweredDown
	case lv.DomainEventStoppedDestroyed:
		end.Cause = hypervisor.EndDestroyed
	case lv.DomainEventStoppedCrashed:
		end.Cause = hypervisor.EndCrashed
	case lv.DomainEventStoppedMigrated:
		end.Cause = hypervisor.EndMigrated
		g.setArriving(nil) // another host has it now
	case lv.DomainEventStoppedSaved:
		end.Cause = hypervisor.EndSaved
	default: // QEMU has ended by itself, or was ended by somebody else
		end.Cause, end.Signal, end.Status = exitOf(proc)
	}
	if intent != "" {
		end.Cause = intent
	}
	g.d.log.Info("guest ended", "guest", g.name, "end", end.String())
	g.mu.Lock()
	g.end = &end
	g.mu.Unlock()
}

// exitOf is how a process ended that libvirt says has.
func exitOf(p *process) (cause hypervisor.EndCause, signal, status int) {
	if p == nil {
		return hypervisor.EndVanished, 0, 0
	}
	timer := time.NewTimer(exitGrace)
	defer timer.Stop()
	var ws *unix.WaitStatus
	select {
	case <-p.ended:
		ws = p.exit
	case <-timer.C:
	}
	switch {
	case ws == nil:
		return hypervisor.EndVanished, 0, 0
	case ws.Signaled():
		return hypervisor.EndKilled, int(ws.Signal()), 0
	}
	return hypervisor.EndExited, 0, ws.ExitStatus()
}

// look brings what the driver knows of a domain up to what libvirt says.
func (g *domain) look(ctx context.Context, l *link) error {
	g.looking.Lock()
	defer g.looking.Unlock()
	err := g.ask(ctx, l)
	if !isCode(err, lv.ErrNoDomain) { // at whichever question
		return err
	}
	g.mu.Lock()
	r, held := g.arriving, g.shell != nil
	g.mu.Unlock()
	switch {
	case held:
		return nil // libvirt is yet to make it, or who holds the shell deals with its end
	case g.lives():
		return g.forgotten()
	case g.forgottenTillNow():
		g.lookAgain()
		return nil
	case r != nil && r.Persistent != "":
		return g.lostOnArrival(ctx, l, *r)
	}
	return g.vanished()
}

func (g *domain) ask(ctx context.Context, l *link) error {
	dom, err := call(ctx, l, func(l *link) (lv.Domain, error) { return l.DomainLookupByUUID(g.ref().UUID) })
	if err != nil {
		return err
	}
	state, word, err := g.stateAt(ctx, l)
	if err != nil {
		return err
	}
	if f, is := g.onItsWay(word); is {
		return g.seen(f, state, word)
	}
	if state == hypervisor.StateStopped { // defined again, perhaps, since it was forgotten
		if errors.Is(g.d.notForgotten(ctx, l, g.name, g.uuid), errForgotten) {
			return g.forgotten()
		}
	}
	text, err := call(ctx, l, func(l *link) (string, error) { return l.DomainGetXMLDesc(dom, 0) })
	if err != nil {
		return err
	}
	f, err := parseFacts(text)
	if err != nil {
		return err
	}
	return g.seen(f, state, word)
}

// onItsWay says whether libvirt may not describe a domain in this state, and what
// is known of it already. Libvirt 11 wants a job on a domain to tell its XML, in
// any form, which it does not get as long as the domain comes from another host:
// it tries for 30 seconds, during which nothing else would be seen. One of our
// own that stands still to go away can be asked.
func (g *domain) onItsWay(word string) (facts, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.facts, word == pausedToMigrate && !g.suspended
}

// stateAt is the domain's state by libvirt, and libvirt's word for it.
func (g *domain) stateAt(ctx context.Context, l *link) (hypervisor.State, string, error) {
	type answer struct{ state, reason int32 }
	a, err := call(ctx, l, func(l *link) (answer, error) {
		state, reason, err := l.DomainGetState(g.ref(), 0)
		return answer{state, reason}, err
	})
	if err != nil {
		return "", "", err
	}
	state, word := stateOf(lv.DomainState(a.state), lv.DomainPausedReason(a.reason))
	return state, word, nil
}

// seen takes over what libvirt says.
func (g *domain) seen(f facts, state hypervisor.State, word string) error {
	active := state != hypervisor.StateStopped
	g.mu.Lock()
	old, learners := g.proc, g.learners
	g.mu.Unlock()
	proc, err := g.processNow(old, active)
	errs := []error{err}
	obstacles := append(deviceReasons(f.xml), proc.obstacles()...)
	keep := learners
	switch {
	case state == hypervisor.StateRunning && learners == nil:
		keep = nics.Learn(g.d.ctx, g.d.log, g.name, f.cards)
	case !active:
		keep = nil
	}
	came, err := g.coming()
	errs = append(errs, err)
	var next step
	g.tell(func() {
		g.facts, g.state, g.runstate, g.proc, g.learners = f, state, word, proc, keep
		g.obstacles = obstacles
		g.lost = false
		if active {
			g.end = nil
		}
		if proc != nil && g.owed == "" {
			g.again = 0
		}
		next = g.advance(came)
	})
	if old != nil && old != proc {
		errs = append(errs, old.close())
	}
	if learners != nil && keep == nil {
		errs = append(errs, learners.Close())
	}
	switch next {
	case arriveNow:
		g.d.wg.Go(g.arrive)
	case forgetFiles:
		// After the flags, so that one that is suspended just now is either seen
		// to be or cleared up after by Resume.
		errs = append(errs, g.files.remove())
	}
	if active && proc == nil {
		g.lookAgain()
	}
	return errors.Join(errs...)
}

// processNow is the process of a domain that had old, or none.
func (g *domain) processNow(old *process, active bool) (*process, error) {
	if !active {
		return nil, nil
	}
	if old != nil {
		select {
		case <-old.ended:
		default:
			return old, nil
		}
	}
	proc, err := g.d.findProcess(g.name, g.uuid)
	if errors.Is(err, errNoProcess) {
		err = nil
	}
	return proc, err
}

// The pauses between two looks at a domain without a process, which is about to be
// forgotten, or its PID cannot be found out; or at one that cannot be defined yet.
const (
	againFirst = 500 * time.Millisecond
	againLast  = 30 * time.Second
)

// lookAgain looks at a domain until libvirt and its process agree, and nothing is
// owed to it. A libvirtd that starts, and finds that a domain's QEMU has ended
// meanwhile, forgets a transient domain without an event.
func (g *domain) lookAgain() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.awaited || g.gone {
		return
	}
	g.awaited = true
	wait := max(g.again, againFirst)
	g.again = min(2*wait, againLast)
	g.d.wg.Go(func() {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-g.d.ctx.Done():
			return
		}
		l, err := g.d.conn.await(g.d.ctx)
		g.mu.Lock()
		g.awaited = false
		gone, owed := g.gone, g.owed != ""
		g.mu.Unlock()
		if err == nil && !gone {
			ctx, cancel := context.WithTimeout(g.d.ctx, lookTimeout)
			defer cancel()
			err = g.look(ctx, l)
		}
		if g.d.ctx.Err() != nil {
			return
		}
		if err != nil {
			g.d.log.Debug("look at a domain again", "guest", g.name, "error", err)
		}
		// Without a connection it is looked at when there is one.
		if (err != nil || owed) && !errors.Is(err, errDisconnected) {
			g.lookAgain()
		}
	})
}

// vanished notes that libvirt knows the domain no more.
func (g *domain) vanished() error {
	g.mu.Lock()
	gone := g.gone
	g.gone = true
	g.mu.Unlock()
	if gone {
		return nil // the files may be those of another of the same UUID by now
	}
	// The name is free once the files are gone.
	err := g.files.remove()
	return errors.Join(err, g.d.forget(g))
}

// pausedToMigrate is a domain's that comes from another host, or has stopped to go
// to one.
const pausedToMigrate = "paused (migration)"

// stateOf translates libvirt's state, and says it in a word.
func stateOf(s lv.DomainState, reason lv.DomainPausedReason) (hypervisor.State, string) {
	switch s {
	case lv.DomainRunning, lv.DomainBlocked:
		return hypervisor.StateRunning, "running"
	case lv.DomainPaused:
		switch reason {
		case lv.DomainPausedMigration:
			return hypervisor.StatePaused, pausedToMigrate
		case lv.DomainPausedIoerror:
			return hypervisor.StatePaused, "paused (I/O error)"
		}
		return hypervisor.StatePaused, "paused"
	case lv.DomainPmsuspended:
		return hypervisor.StatePaused, "suspended by the guest"
	case lv.DomainShutdown:
		return hypervisor.StateStopping, "shutting down"
	case lv.DomainCrashed:
		return hypervisor.StatePaused, "crashed"
	}
	return hypervisor.StateStopped, ""
}
