package libvirt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	lv "github.com/digitalocean/go-libvirt"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/nics"
	"github.com/lmctl/lmctl/internal/hypervisor/queue"
)

// suspension is a domain's migration as QEMU and libvirt see it: from the call
// Perform3 on.
type suspension struct {
	l         *link // the connection on which it was called, and is to be confirmed
	stream    *qemuStream
	held      *heldWriter // between the stream and the destination, until SaveState; nil in relay mode
	heard     *queue.Queue[happening]
	performed chan struct{} // closed when Perform3 has returned
	err       error         // of Perform3, valid then

	// What has been heard so far.
	stopped  time.Time // zero while the guest runs
	standing bool      // it stands still, and its block I/O has landed
	passes   passes
}

var (
	errSuspended  = errors.New("it is suspended already; resume it first")
	errChanged    = errors.New("it was changed by another hand during the migration; start it again")
	errGuestEnded = errors.New("the guest was stopped by itself or by another hand")
)

// Suspend has libvirt migrate the domain into w, and returns when QEMU has
// stopped it. When it fails, Resume is to be called.
func (s *Guest) Suspend(ctx context.Context, w io.Writer) (time.Time, error) {
	stopped, err := s.suspend(ctx, w)
	if err != nil {
		return time.Time{}, fmt.Errorf("suspend guest %s: %w", s.g.name, err)
	}
	return stopped, nil
}

func (s *Guest) suspend(ctx context.Context, w io.Writer) (time.Time, error) {
	if s.relaying {
		return s.stopNow(ctx)
	}
	if s.suspension != nil {
		return time.Time{}, errSuspended
	}
	l, err := s.g.d.conn.get()
	if err != nil {
		return time.Time{}, err
	}
	if s.cookie == nil {
		return s.standStill(ctx, l)
	}
	on, err := s.g.capabilities(ctx, l)
	if err != nil {
		return time.Time{}, err
	}
	if err := s.note(ctx, l, suspensionRecord{Name: s.g.name, UUID: s.g.uuid, IgnoredShared: on[ignoreShared]}); err != nil {
		return time.Time{}, err
	}
	if err := s.g.setIgnoreShared(ctx, l, true); err != nil {
		return time.Time{}, err
	}
	_, acks := on[switchoverAck]
	held := &heldWriter{w: w, acks: acks}
	if err := s.perform(l, held.from); err != nil {
		return time.Time{}, err
	}
	s.suspension.held = held
	return s.awaitStop(ctx)
}

// note begins a suspension: what is to be known of it is on disk before anything
// is done to the domain, which must be as it was offered.
func (s *Guest) note(ctx context.Context, l *link, r suspensionRecord) error {
	if err := s.unchanged(ctx, l); err != nil {
		return err
	}
	var err error
	if r.MaxDowntime, err = s.g.maxDowntime(ctx, l); err != nil {
		return err
	}
	if err := write(s.g.files.suspension(), r); err != nil {
		return err
	}
	s.g.tell(func() { s.g.suspended = true })
	if err := l.follow(s.g); err != nil {
		return err
	}
	s.caught = nics.Catch(s.g.d.log, s.g.name, s.g.cards())
	return nil
}

// unchanged makes sure that the domain is as it was offered, and runs.
func (s *Guest) unchanged(ctx context.Context, l *link) error {
	now, err := s.g.likeness(ctx, l)
	if err != nil {
		return err
	}
	if now != s.like {
		return errChanged
	}
	state, word, err := s.g.stateAt(ctx, l)
	if err != nil {
		return err
	}
	if state != hypervisor.StateRunning {
		return fmt.Errorf("%w (%s)", errGuestEnded, word)
	}
	return nil
}

// standStill stops a domain that goes nowhere: another host has the better right
// to it.
func (s *Guest) standStill(ctx context.Context, l *link) (time.Time, error) {
	if err := write(s.g.files.suspension(), suspensionRecord{Name: s.g.name, UUID: s.g.uuid}); err != nil {
		return time.Time{}, err
	}
	s.g.tell(func() { s.g.suspended = true })
	err := do(ctx, l, func(l *link) error { return l.DomainSuspend(s.g.ref()) })
	return time.Now(), err
}

// perform begins the call Perform3, and has carry take what QEMU then says.
func (s *Guest) perform(l *link, carry func(*net.UnixConn) error) error {
	dir, err := s.g.files.streamFolder(s.proc.uid, s.proc.gid)
	if err != nil {
		return err
	}
	stream, err := listenFor(outgoingSocket(dir), s.proc, carry)
	if err != nil {
		return err
	}
	p := &suspension{l: l, stream: stream, heard: queue.New[happening](), performed: make(chan struct{})}
	s.suspension = p
	s.g.listen(p.heard)
	parameters := []lv.TypedParam{
		text("destination_name", s.g.name), text("destination_xml", s.xml),
		text("migrate_uri", "unix://"+outgoingSocket(dir)),
	}
	go func() {
		defer close(p.performed)
		_, p.err = l.DomainMigratePerform3Params(s.g.ref(), nil, parameters, s.cookie, migrateFlags)
	}()
	return nil
}

func text(name, value string) lv.TypedParam {
	return lv.TypedParam{Field: name, Value: *lv.NewTypedParamValueString(value)}
}

// convergeTimeout is how long QEMU may try to send what is not shared memory
// with the guest running before it is made to stop it regardless.
const convergeTimeout = time.Second

// maxDowntime is a downtime at which QEMU stops any guest.
const maxDowntime = 2000 * time.Second

// awaitStop waits until the guest stands still and its block I/O has landed:
// QEMU says STOP before it drains, and pre-switchover after.
func (s *Guest) awaitStop(ctx context.Context) (time.Time, error) {
	p := s.suspension
	hurry := time.NewTimer(convergeTimeout)
	defer hurry.Stop()
	if err := s.await(ctx, func() bool { return p.standing }, hurry.C); err != nil {
		return time.Time{}, err
	}
	s.caught.Stopped(p.stopped)
	return p.stopped, nil
}

// heard takes note of what happens.
func (s *Guest) heard(ctx context.Context, h happening) error {
	p := s.suspension
	switch h.what {
	case suspendedEvent:
		p.stopped = earlier(p.stopped, h.at)
	case "pre-switchover", "device", "completed":
		// Libvirt's word of the stop may come after QEMU's of what follows it.
		p.stopped, p.standing = earlier(p.stopped, h.at), true
	case "failed", "cancelled":
		return s.failure(ctx)
	case passEvent:
		p.passes.begun(h)
	}
	return nil
}

// await listens until enough has been heard, which it asks after each thing, or
// the migration has failed. When hurry comes, QEMU is told to stop the guest.
func (s *Guest) await(ctx context.Context, enough func() bool, hurry <-chan time.Time) error {
	p := s.suspension
	performed, streamed := p.performed, p.stream.done
	for {
		if enough() {
			return nil
		}
		if h, ok, _ := p.heard.Take(); ok {
			if err := s.heard(ctx, h); err != nil {
				return err
			}
			continue
		}
		select {
		case <-p.heard.Woken():
		case <-performed:
			if p.err != nil {
				return s.failure(ctx)
			}
			performed = nil // it is over, and the events are on their way
		case <-streamed:
			if p.stream.err != nil {
				return s.failure(ctx)
			}
			streamed = nil // likewise
		case <-hurry:
			s.allow(maxDowntime)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// maxDowntime is how long QEMU may have the guest stand still, in milliseconds.
func (g *domain) maxDowntime(ctx context.Context, l *link) (uint64, error) {
	return call(ctx, l, func(l *link) (uint64, error) { return l.DomainMigrateGetMaxDowntime(g.ref(), 0) })
}

// allow tells QEMU how long the guest may stand still. That comes too late when
// it has stopped it already.
func (s *Guest) allow(downtime time.Duration) {
	err := s.suspension.l.DomainMigrateSetMaxDowntime(s.g.ref(), uint64(max(downtime.Milliseconds(), 1)), 0)
	if err != nil {
		s.g.d.log.Debug("tell QEMU the downtime", "guest", s.g.name, "downtime", downtime, "error", err)
	}
}

// earlier is the first of two times, of which the zero time is none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}

// failure is why libvirt's migration has failed, which its call says.
func (s *Guest) failure(ctx context.Context) error {
	p := s.suspension
	if err := p.stream.close(); err != nil {
		return err
	}
	select {
	case <-p.performed:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	err := p.err
	if err == nil {
		err = errors.New("QEMU's migration failed")
	}
	select {
	case <-p.stream.done:
		if p.stream.err != nil {
			return fmt.Errorf("%w; the state stream: %w", err, p.stream.err)
		}
	case <-ctx.Done():
	}
	return err
}

// attended says whether the libvirtd that began the migration is there.
func (p *suspension) attended() error {
	select {
	case <-p.l.Disconnected():
		return fmt.Errorf("%w: it was lost during the migration", errDisconnected)
	default:
		return nil
	}
}

// SaveState returns when all of the device state has gone to the writer of
// Suspend, and libvirt holds its part for done. Before that, a libvirtd that
// starts anew breaks the migration off and has the domain run here, which must
// not be once it is handed over; after it, it leaves the domain standing. The
// destination loads meanwhile.
func (s *Guest) SaveState(ctx context.Context) error {
	if err := s.saveState(ctx); err != nil {
		return fmt.Errorf("save the device state of guest %s: %w", s.g.name, err)
	}
	return nil
}

func (s *Guest) saveState(ctx context.Context) error {
	p := s.suspension
	if p == nil {
		return errors.New("it was not suspended")
	}
	if p.held != nil {
		if err := p.held.release(); err != nil {
			return err
		}
	}
	streamed, performed := p.stream.done, p.performed
	for streamed != nil || performed != nil {
		for h, ok, _ := p.heard.Take(); ok; h, ok, _ = p.heard.Take() {
			if h.what == "failed" || h.what == "cancelled" || h.what == "cancelling" {
				return s.failure(ctx)
			}
		}
		select {
		case <-p.heard.Woken():
		case <-streamed:
			// QEMU closes its end when it has completed, or has failed.
			if streamed = nil; p.stream.err != nil {
				return s.failure(ctx)
			}
		case <-performed:
			if performed = nil; p.err != nil {
				return s.failure(ctx)
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return p.attended()
}
