package libvirt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	lv "github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// resumeTimeout bounds Resume. It does not end with the caller's context: a
// cancelled migration is just when the guest must not be left standing.
const resumeTimeout = 60 * time.Second

// retryEvery is the pause between two attempts at what libvirt refuses while its
// own job on the domain is not over.
const retryEvery = 100 * time.Millisecond

// Resume lets the domain go on here, whatever became of its migration: nobody
// else may run it. It breaks off what libvirt still does, has the domain running
// and puts QEMU's settings back. It may be repeated, and it also ends a
// suspension that an earlier agent began.
func (s *Guest) Resume(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resumeTimeout)
	defer cancel()
	s.g.mu.Lock()
	suspended := s.g.suspended
	s.g.mu.Unlock()
	if !suspended {
		return nil
	}
	if err := s.resume(ctx); err != nil {
		return fmt.Errorf("resume guest %s: %w", s.g.name, err)
	}
	return nil
}

func (s *Guest) resume(ctx context.Context) error {
	if err := s.breakOff(ctx); err != nil {
		return err
	}
	l, err := s.g.d.conn.await(ctx)
	if err != nil {
		return err
	}
	if err := s.g.revive(ctx, l); err != nil {
		if errors.Is(err, errGuestEnded) {
			err = errors.Join(err, s.g.look(ctx, l)) // nothing of its suspension is to stay
		}
		return err
	}
	err = s.caught.Close()
	s.caught = nil
	return errors.Join(err, s.g.restore(ctx, l))
}

// breakOff ends libvirt's migration, with the domain staying here. A completed
// one is confirmed as cancelled; one under way fails, since nobody reads what
// QEMU writes, and libvirt has the domain go on by itself. It is never aborted:
// QEMU 7.2 would leave the disks of a domain inactive that it was just about to
// complete.
func (s *Guest) breakOff(ctx context.Context) error {
	p := s.suspension
	if p == nil {
		return nil
	}
	if err := p.end(ctx); err != nil {
		return err
	}
	s.g.listen(nil)
	s.suspension = nil
	if p.err != nil {
		return nil
	}
	err := do(ctx, p.l, func(l *link) error {
		return l.DomainMigrateConfirm3Params(s.g.ref(), nil, nil, uint32(migrateFlags), 1)
	})
	if errors.Is(err, errDisconnected) {
		return nil // what is left of it is a domain that stands still
	}
	return err
}

// end breaks the stream off and waits until libvirt's call is over.
func (p *suspension) end(ctx context.Context) error {
	if err := p.stream.close(); err != nil {
		return err
	}
	for _, over := range []<-chan struct{}{p.stream.done, p.performed} {
		select {
		case <-over:
		case <-ctx.Done():
			return fmt.Errorf("libvirt's migration does not end: %w", context.Cause(ctx))
		}
	}
	return nil
}

// revive waits until the domain runs, and has it run if libvirt does not.
func (g *domain) revive(ctx context.Context, l *link) error {
	var refused error
	for {
		state, _, err := g.stateAt(ctx, l)
		if err != nil {
			return errors.Join(refused, err)
		}
		switch state {
		case hypervisor.StateRunning:
			return nil
		case hypervisor.StateStopped:
			return errGuestEnded
		case hypervisor.StatePaused:
			if refused = do(ctx, l, func(l *link) error { return l.DomainResume(g.ref()) }); refused == nil {
				return nil
			}
		}
		if err := pause(ctx); err != nil {
			return errors.Join(refused, err)
		}
	}
}

// pause waits before the next attempt.
func pause(ctx context.Context) error {
	timer := time.NewTimer(retryEvery)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// restore puts QEMU's settings back and forgets the suspension.
func (g *domain) restore(ctx context.Context, l *link) error {
	var before suspensionRecord
	err := read(g.files.suspension(), &before)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	} else if err == nil && !before.IgnoredShared && !before.Relayed {
		err = g.setIgnoreShared(ctx, l, false)
	}
	if err == nil && before.MaxDowntime != 0 {
		err = g.restoreMaxDowntime(ctx, l, before.MaxDowntime)
	}
	if err == nil {
		err = g.files.endSuspension()
	}
	if err != nil {
		return err
	}
	g.tell(func() { g.suspended = false })
	return g.look(ctx, l)
}

// restoreMaxDowntime puts back what libvirt does not, when it was changed just as
// libvirt's migration was over.
func (g *domain) restoreMaxDowntime(ctx context.Context, l *link, before uint64) error {
	now, err := g.maxDowntime(ctx, l)
	if err != nil || now == before {
		return err
	}
	return do(ctx, l, func(l *link) error { return l.DomainMigrateSetMaxDowntime(g.ref(), before, 0) })
}

// Release ends the suspended copy of a domain that another host runs, and with
// it its definition here. Its disks and its NVRAM stay.
func (s *Guest) Release(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	if err := s.release(ctx); err != nil {
		return fmt.Errorf("release guest %s: %w", s.g.name, err)
	}
	return nil
}

func (s *Guest) release(ctx context.Context) error {
	s.g.setArriving(nil) // another host has it now
	s.g.intend(hypervisor.EndMigrated)
	if p := s.suspension; p != nil {
		if err := p.end(ctx); err != nil {
			return err
		}
		s.g.listen(nil)
		s.suspension = nil
		if p.attended() != nil {
			// The next libvirtd would have the domain run here.
			if err := unix.PidfdSendSignal(s.pidfd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		}
		if p.err == nil {
			err := do(ctx, p.l, func(l *link) error {
				return l.DomainMigrateConfirm3Params(s.g.ref(), nil, nil, uint32(migrateFlags), 0)
			})
			if err != nil {
				s.g.d.log.Warn("libvirt did not take the end of its migration", "guest", s.g.name, "error", err)
			}
		}
	}
	l, err := s.g.d.conn.await(ctx)
	if err != nil {
		return err
	}
	return s.g.removeCopy(ctx, l)
}

// keepAtSource are the flags with which a domain is undefined that runs on
// another host. Managed saves and snapshots have been looked for before it
// moved.
const keepAtSource = lv.DomainUndefineKeepNvram | lv.DomainUndefineManagedSave | lv.DomainUndefineSnapshotsMetadata | lv.DomainUndefineCheckpointsMetadata

// removeCopy ends a domain that runs elsewhere and forgets it.
func (g *domain) removeCopy(ctx context.Context, l *link) error {
	for {
		state, _, err := g.stateAt(ctx, l)
		if isCode(err, lv.ErrNoDomain) {
			return g.vanished()
		}
		if err != nil {
			return err
		}
		switch state {
		case hypervisor.StateRunning:
			return errors.New("it runs here, by another hand")
		case hypervisor.StateStopped:
			err := do(ctx, l, func(l *link) error { return l.DomainUndefineFlags(g.ref(), keepAtSource) })
			if err != nil && !isCode(err, lv.ErrNoDomain) {
				return err
			}
			return g.vanished()
		}
		err = do(ctx, l, func(l *link) error { return l.DomainDestroy(g.ref()) })
		if err == nil || isCode(err, lv.ErrNoDomain) {
			continue
		}
		// It may be ending, or libvirt be busy with it.
		if waitErr := pause(ctx); waitErr != nil {
			return errors.Join(err, waitErr)
		}
	}
}
