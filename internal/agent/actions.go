package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/ledger"
	"github.com/lmctl/lmctl/migrate"
)

// actionTimeout bounds what is done about a guest in one step: longer than the
// driver waits for anything.
const actionTimeout = 2 * time.Minute

// carryOut does what was decided about a guest. The guest's openGuest is held.
func (s *settler) carryOut(ctx context.Context, action ledger.Action, r ledger.Record, f ledger.Facts, peer *ledger.Statement, g *openGuest) error {
	// What has been decided is done, but nothing may hold up the guest for ever.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), actionTimeout)
	defer cancel()
	switch action {
	case ledger.Resume:
		return s.resume(ctx, r, f)
	case ledger.Run:
		return s.run(ctx, r, f, g)
	case ledger.OwnCrashed:
		return s.ownCrashed(ctx, r, g)
	case ledger.Withdraw:
		return errors.Join(s.endCopy(ctx, r.Guest, f, g), s.a.ledger.Withdraw(ctx, *r.Handover))
	case ledger.Drop:
		return s.drop(ctx, r, f, g)
	case ledger.Release:
		if err := s.removeCopy(ctx, r.Guest); err != nil {
			return err
		}
		return s.a.ledger.Forget(ctx, *r.Handover)
	case ledger.Reclaim:
		if err := s.a.ledger.Reclaim(ctx, *r.Handover); err != nil {
			return err
		}
		return s.goOn(ctx, r.Guest, f)
	case ledger.Suspend:
		return s.suspend(ctx, r, f)
	case ledger.Yield:
		if err := s.removeCopy(ctx, r.Guest); err != nil {
			return err
		}
		return s.a.ledger.Yield(ctx, r.Guest, peer.Epoch)
	}
	return fmt.Errorf("agent: no such action %q", action)
}

// resume puts a suspended guest of this host back into life.
func (s *settler) resume(ctx context.Context, r ledger.Record, f ledger.Facts) error {
	if err := s.goOn(ctx, r.Guest, f); err != nil {
		return err
	}
	if r.State == ledger.Moving {
		return s.a.ledger.Cancel(ctx, *r.Handover)
	}
	return nil
}

// goOn resumes a suspended copy, if there is one.
func (s *settler) goOn(ctx context.Context, guest string, f ledger.Facts) error {
	if f.Copy != ledger.PausedCopy {
		return nil
	}
	if f.Shell {
		// It was told to run, and it is not known whether it does.
		found, _, err := s.a.driver.ShellOf(guest)
		if err != nil {
			return err
		}
		if err := found.Resume(ctx); err != nil {
			return errors.Join(err, found.Close())
		}
		return nil
	}
	held, err := s.a.driver.Source(guest)
	if err != nil {
		return err
	}
	return errors.Join(held.Resume(ctx), held.Close())
}

// run starts a shell whose handover is certain.
func (s *settler) run(ctx context.Context, r ledger.Record, f ledger.Facts, g *openGuest) error {
	if f.Copy == ledger.RunningCopy { // all that is missing is the note
		return errors.Join(s.a.ledger.Accept(ctx, *r.Handover), s.a.ledger.Own(ctx, *r.Handover), s.dropShell(g))
	}
	in, found, err := s.shell(r, g)
	if err != nil {
		return err
	}
	err = s.a.receiver.Finish(ctx, in)
	if found != nil {
		err = errors.Join(err, found.Close()) // if it runs, that leaves it alone
	}
	return errors.Join(err, s.dropShell(g))
}

// shell is the shell of a record: the one that the receiver left, or the one
// that an earlier agent did.
func (s *settler) shell(r ledger.Record, g *openGuest) (migrate.Incoming, hypervisor.Shell, error) {
	s.mu.Lock()
	in := g.shell
	s.mu.Unlock()
	if in != nil && in.Handover.ID == r.Handover.ID {
		return *in, nil, nil
	}
	found, _, err := s.a.driver.ShellOf(r.Guest)
	if err != nil {
		return migrate.Incoming{}, nil, err
	}
	return migrate.Incoming{Handover: *r.Handover, Shell: found}, found, nil
}

// dropShell gives back what the receiver left, if it did: from here on the
// driver has to find it again.
func (s *settler) dropShell(g *openGuest) error {
	s.mu.Lock()
	in := g.shell
	g.shell = nil
	s.mu.Unlock()
	if in == nil {
		return nil
	}
	if held, ok := in.Shell.(io.Closer); ok {
		return held.Close()
	}
	return nil
}

// ownCrashed makes a guest this host's whose process has ended.
func (s *settler) ownCrashed(ctx context.Context, r ledger.Record, g *openGuest) error {
	if err := s.restoreDefinition(r.Guest); err != nil {
		return err
	}
	if err := s.dropShell(g); err != nil {
		return err
	}
	return s.a.ledger.Own(ctx, *r.Handover)
}

// errNotKept says that nobody here has a guest's definition.
var errNotKept = errors.New("its definition was not kept")

// restoreDefinition defines a guest again that the driver has forgotten
// together with its shell.
func (s *settler) restoreDefinition(guest string) error {
	if _, err := s.a.driver.Get(guest); !errors.Is(err, hypervisor.ErrNotFound) {
		return err
	}
	uuid := s.a.ledger.Get(guest).UUID
	text, ok := s.a.kept.get(guest)
	if ok {
		_, of, err := s.a.driver.Identify(text)
		ok = err == nil && of == uuid
	}
	if !ok {
		return fmt.Errorf("agent: guest %s is not defined on this host and %w: `lmctl guest define` it again, with UUID %s", guest, errNotKept, uuid)
	}
	_, err := s.a.driver.Define(text)
	return err
}

// endCopy ends what a guest that never was this host's has here. One that runs is
// no shell, or not any more: nothing of ours holds it, and it goes on.
func (s *settler) endCopy(ctx context.Context, guest string, f ledger.Facts, g *openGuest) error {
	if f.Copy == ledger.RunningCopy {
		return s.dropShell(g)
	}
	return s.endShell(ctx, guest, g)
}

// endShell destroys what is left of a shell.
func (s *settler) endShell(ctx context.Context, guest string, g *openGuest) error {
	s.mu.Lock()
	in := g.shell
	s.mu.Unlock()
	if in != nil {
		err := in.Shell.Destroy(ctx)
		return errors.Join(err, s.dropShell(g))
	}
	found, _, err := s.a.driver.ShellOf(guest)
	var state *hypervisor.StateError
	switch {
	case errors.Is(err, hypervisor.ErrNotFound):
		return nil
	case errors.As(err, &state) && state.State == hypervisor.StateStopped:
		return s.removeCopy(ctx, guest) // its process has ended
	}
	if err != nil {
		return err
	}
	if err := found.Destroy(ctx); err != nil {
		return errors.Join(err, found.Close())
	}
	return nil
}

// drop removes what is left here of a guest that this host need not answer for.
func (s *settler) drop(ctx context.Context, r ledger.Record, f ledger.Facts, g *openGuest) error {
	switch {
	case f.Copy == ledger.NoCopy:
	case f.Copy == ledger.RunningCopy && f.Foreign: // by another hand
	case f.Shell:
		if err := s.endShell(ctx, r.Guest, g); err != nil {
			return err
		}
	default:
		if err := s.removeCopy(ctx, r.Guest); err != nil {
			return err
		}
	}
	if r.State == ledger.Prepared || r.State == ledger.Withdrawn {
		if err := s.a.ledger.Drop(ctx, *r.Handover); err != nil {
			return err
		}
		s.a.know(ctx, r.Guest)
	}
	return nil
}

// removeCopy removes all that this host has of a guest but its disks. It does
// not touch one whose vCPUs run.
func (s *settler) removeCopy(ctx context.Context, guest string) error {
	info, err := s.a.driver.Get(guest)
	if errors.Is(err, hypervisor.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.PID == 0 {
		return s.a.driver.Undefine(guest)
	}
	if c, _ := s.a.copyOf(guest); c != ledger.PausedCopy {
		return fmt.Errorf("agent: guest %s runs here and is not removed", guest)
	}
	held, err := s.a.driver.Source(guest)
	if err != nil {
		return err
	}
	return errors.Join(held.Release(ctx), held.Close())
}

// suspend stops a guest that another host owns by a higher right.
func (s *settler) suspend(ctx context.Context, r ledger.Record, f ledger.Facts) error {
	if r.State == ledger.Moving {
		if err := s.a.ledger.Cancel(ctx, *r.Handover); err != nil {
			return err
		}
	}
	if r.State == ledger.Owned || r.State == ledger.Moving {
		if err := s.a.ledger.Contest(ctx, r.Guest); err != nil {
			return err
		}
	}
	if f.Copy != ledger.RunningCopy {
		return nil
	}
	held, err := s.a.driver.Source(r.Guest)
	if err != nil {
		return err
	}
	_, err = held.Suspend(ctx, io.Discard)
	return errors.Join(err, held.Close())
}
