package libvirt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"time"

	lv "github.com/digitalocean/go-libvirt"
	"github.com/google/uuid"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// A domain arrives when it has been told to run here: from then on it is this
// host's guest, whatever becomes of it, and no other host's. What is left to do is
// to have libvirt define it. Until that is done, the domain has an arriving record;
// one that ends before is defined all the same, as one that has ended.

// settleTimeout bounds what is done about a domain that runs here now.
const settleTimeout = time.Minute

// settleIn makes what was a shell a domain like any other: it is defined here if
// it was at the source. If it cannot be, it is looked at again, and again tried.
func (g *domain) settleIn(r shellRecord) {
	ctx, cancel := context.WithTimeout(g.d.ctx, settleTimeout)
	defer cancel()
	err := g.makeOrdinary(ctx, r)
	for errors.Is(err, errDisconnected) && pause(ctx) == nil {
		err = g.makeOrdinary(ctx, r) // the next libvirtd knows the domain, and not yet its definition
	}
	if err != nil && g.d.ctx.Err() == nil {
		g.owe(err)
	}
}

// owe notes why a domain that came here could not be made an ordinary one, and has
// it looked at again: a disk that is full may have room by then, or a name that is
// taken be free. Until then it runs as one that libvirt has no definition of, which
// an operator is to know of once.
func (g *domain) owe(err error) {
	why, level := err.Error(), slog.LevelDebug
	g.mu.Lock()
	if g.arriving == nil { // it is defined, or it was somebody else's word that it need not be
		g.mu.Unlock()
		g.d.log.Error("look at a guest that came here", "guest", g.name, "error", err)
		return
	}
	if why != g.owed && !errors.Is(err, errDisconnected) {
		level = slog.LevelError
	}
	g.owed = why
	g.mu.Unlock()
	g.d.log.Log(context.Background(), level, "a guest that came here cannot be defined; it will be tried again", "guest", g.name, "error", err)
	g.lookAgain()
}

// paid notes that a domain that came here is an ordinary one. The mu is held.
func (g *domain) paid() {
	if g.owed != "" {
		g.d.log.Info("a guest that came here is defined after all", "guest", g.name)
	}
	g.arriving, g.owed = nil, ""
}

func (g *domain) makeOrdinary(ctx context.Context, r shellRecord) error {
	l, err := g.d.conn.await(ctx)
	if err != nil {
		return err
	}
	if err := g.define(ctx, l, r); err != nil {
		return err
	}
	g.tell(func() {
		g.incoming = false
		g.paid()
	})
	if err := g.files.remove(); err != nil {
		return err
	}
	return g.look(ctx, l)
}

// setArriving notes that the domain arrives, or with nil that nothing is left to do.
func (g *domain) setArriving(r *shellRecord) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.arriving = r; r == nil {
		g.owed = ""
	}
}

// arrival is the record of a domain that arrives, else nil.
func (g *domain) arrival() *shellRecord {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.arriving
}

// define has libvirt define a domain that came here as it was defined at its
// source, if it was, and unless it is defined here already: then an operator did
// so, who knows better.
func (g *domain) define(ctx context.Context, l *link, r shellRecord) error {
	if r.Persistent == "" {
		return nil
	}
	dom, known, err := defined(ctx, l, r)
	if err == nil && !known {
		dom, err = g.d.defineXML(ctx, l, r.Name, r.UUID, r.Persistent)
	}
	if err == nil && r.Autostart {
		err = do(ctx, l, func(l *link) error { return l.DomainSetAutostart(dom, 1) })
		if err != nil && !errors.Is(err, errDisconnected) && ctx.Err() == nil {
			g.d.log.Error("have a guest that came here start with the host", "guest", r.Name, "error", err)
			err = nil // it is defined
		}
	}
	if err != nil {
		return fmt.Errorf("define guest %s, which came here: %w", r.Name, err)
	}
	return nil
}

// defined says whether libvirt has a definition of a domain that came here.
func defined(ctx context.Context, l *link, r shellRecord) (dom lv.Domain, is bool, err error) {
	dom, err = call(ctx, l, func(l *link) (lv.Domain, error) { return l.DomainLookupByName(r.Name) })
	if isCode(err, lv.ErrNoDomain) {
		return dom, false, nil
	}
	if err != nil || uuid.UUID(dom.UUID).String() != r.UUID {
		return dom, false, err
	}
	persistent, err := call(ctx, l, func(l *link) (int32, error) { return l.DomainIsPersistent(dom) })
	if isCode(err, lv.ErrNoDomain) {
		return dom, false, nil
	}
	return dom, persistent != 0, err
}

// expectArrival is for a domain that was told to run, and of which it is not known
// whether it does: it arrives when it is seen to run, or to have ended. A shell
// still holds it, so that it has not been forgotten.
func (g *domain) expectArrival(r shellRecord) {
	g.setArriving(&r)
	if g.runs() {
		g.d.wg.Go(g.arrive)
	}
}

// arrive does what is still to be done about a domain that was told to run here,
// and does, but whose shell is not there any more: the agent that told it died,
// or libvirtd did before it could say so.
func (g *domain) arrive() {
	done, err := g.beginWhenFree("incoming migration")
	if err != nil {
		return // the driver is being closed
	}
	defer done()
	if r := g.arrival(); r != nil { // else it has arrived meanwhile
		g.settleIn(*r)
	}
}

// beginWhenFree is begin, once nothing else holds the domain.
func (g *domain) beginWhenFree(operation string) (done func(), err error) {
	for {
		done, err := g.begin(operation)
		if busy := (*hypervisor.BusyError)(nil); !errors.As(err, &busy) {
			return done, err
		}
		if err := pause(g.d.ctx); err != nil {
			return nil, err
		}
	}
}

// traveller is what is on disk of a domain on its way here, or just here.
type traveller struct {
	shellRecord
	told bool // to run here
}

// coming reads it; nil if there is nothing.
func (g *domain) coming() (*traveller, error) {
	var t traveller
	switch err := read(g.files.shell(), &t.shellRecord); {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("what is to be known of a guest that comes here: %w", err)
	}
	t.told = there(g.files.resumed())
	return &t, nil
}

// step is what follows from a look at a domain for one that was on its way here,
// or away.
type step int

const (
	goOn        step = iota
	arriveNow        // it was told to run here, and does, and nobody sees to the rest
	forgetFiles      // what is on disk of it is of a migration that is over
)

// advance brings the flags of a domain up to its state and to what is on disk of
// its way here. The mu is held.
func (g *domain) advance(came *traveller) step {
	switch {
	case g.shell != nil: // whoever holds that sees to the rest
		if came != nil && came.told && g.state == hypervisor.StateRunning {
			g.incoming = false
		}
	case g.state == hypervisor.StateStopped: // and defined
		g.incoming, g.suspended, g.arriving, g.owed = false, false, nil, ""
		return forgetFiles
	case came == nil:
	case !came.isOf(g.proc, g.state): // another hand's, in the place of an earlier agent's shell
		g.incoming, g.arriving, g.owed = false, nil, ""
		return forgetFiles
	case g.state == hypervisor.StateRunning && came.told:
		g.incoming = false
		if g.busy == "" {
			g.arriving, g.brought = &came.shellRecord, came.Cards
			return arriveNow
		}
	}
	// One that runs and was not told to by us is a shell all the same, which another
	// hand has resumed.
	return goOn
}

// isOf says whether a process, or none that is known, may be that of the shell of
// the record. An agent that died before it noted the process left a shell that
// libvirt ends, and that does not run.
func (r *shellRecord) isOf(p *process, state hypervisor.State) bool {
	switch {
	case p == nil:
		return true
	case r.PID == 0:
		return state != hypervisor.StateRunning
	}
	return p.pid == r.PID && p.start == r.Start
}

// settleDebt defines a domain that came here, and could not be defined when it
// did: without, it would go on to the next host as one that never was.
func (g *domain) settleDebt(ctx context.Context) error {
	if r := g.arrival(); r != nil {
		return g.makeOrdinary(ctx, *r)
	}
	return nil
}

// lostOnArrival deals with a domain that libvirt knows no more, and that was
// arriving: it is defined, and stays among the others until that has been done.
// The looking is held.
func (g *domain) lostOnArrival(ctx context.Context, l *link, r shellRecord) error {
	if err := g.define(ctx, l, r); err != nil {
		var old *process
		g.tell(func() {
			old, g.proc = g.proc, nil
			g.state, g.runstate, g.incoming = hypervisor.StateStopped, "", false
		})
		g.owe(err)
		return old.close()
	}
	g.mu.Lock()
	g.paid()
	g.mu.Unlock()
	return g.ask(ctx, l)
}
