package libvirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	lv "github.com/digitalocean/go-libvirt"

	"github.com/lmctl/lmctl/internal/hypervisor/nics"
)

// suspension is a domain's migration as QEMU and libvirt see it: from the call
// Perform3 on.
type suspension struct {
	l         *lv.Libvirt // the connection on which it was called, and is to be confirmed
	stream    *stateStream
	events    <-chan lv.DomainEvent
	stop      context.CancelFunc // of the events
	performed chan struct{}      // closed when Perform3 has returned
	err       error              // of Perform3, valid then
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
	if s.suspension != nil {
		return time.Time{}, errSuspended
	}
	if s.xml == "" {
		if _, err := s.Definition(ctx); err != nil {
			return time.Time{}, err
		}
	}
	l, err := s.g.d.conn.get()
	if err != nil {
		return time.Time{}, err
	}
	if now, err := s.g.likeness(ctx, l); err != nil || now != s.like {
		return time.Time{}, errors.Join(err, errChanged)
	}
	before, err := s.g.ignoresShared(ctx, l)
	if err != nil {
		return time.Time{}, err
	}
	if err := write(s.g.files.suspension(), suspensionRecord{Name: s.g.name, UUID: s.g.uuid, IgnoredShared: before}); err != nil {
		return time.Time{}, err
	}
	s.g.tell(func() { s.g.suspended = true })
	if err := s.g.setIgnoreShared(ctx, l, true); err != nil {
		return time.Time{}, err
	}
	s.caught = nics.Catch(s.g.d.log, s.g.name, s.g.cards())
	if err := s.perform(l, w); err != nil {
		return time.Time{}, err
	}
	return s.awaitStop(ctx)
}

// perform begins the call Perform3.
func (s *Guest) perform(l *lv.Libvirt, w io.Writer) error {
	dir, err := s.g.files.streamFolder(s.proc.uid, s.proc.gid)
	if err != nil {
		return err
	}
	stream, err := forward(outgoingSocket(dir), s.proc, w)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(s.g.d.ctx)
	events, err := l.SubscribeQEMUEvents(ctx, s.g.name)
	if err != nil {
		stop()
		return errors.Join(fmt.Errorf("subscribe to QEMU's events: %w", err), stream.close())
	}
	p := &suspension{l: l, stream: stream, events: events, stop: stop, performed: make(chan struct{})}
	s.suspension = p
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
	var stopped time.Time
	hurry := time.NewTimer(convergeTimeout)
	defer hurry.Stop()
	performed, streamed := p.performed, p.stream.done
	for {
		select {
		case e, ok := <-p.events:
			if !ok {
				return time.Time{}, errDisconnected
			}
			switch status(e) {
			case "STOP":
				if stopped.IsZero() {
					stopped = time.Now()
					s.caught.Stopped(sent(e))
				}
			case "pre-switchover", "device":
				if stopped.IsZero() {
					return time.Time{}, errGuestEnded // it stood still before
				}
				return stopped, nil
			case "failed", "cancelled":
				return time.Time{}, s.failure(ctx)
			}
		case <-performed:
			if p.err != nil {
				return time.Time{}, s.failure(ctx)
			}
			performed = nil // it is over, and the events are on their way
		case <-streamed:
			if p.stream.err != nil {
				return time.Time{}, s.failure(ctx)
			}
			streamed = nil // likewise
		case <-hurry.C:
			if err := p.l.DomainMigrateSetMaxDowntime(s.g.ref(), uint64(maxDowntime.Milliseconds()), 0); err != nil {
				s.g.d.log.Debug("hurry QEMU's migration", "guest", s.g.name, "error", err)
			}
		case <-ctx.Done():
			return time.Time{}, context.Cause(ctx)
		}
	}
}

// status is what an event of QEMU says: its name, or the state of a migration.
func status(e lv.DomainEvent) string {
	if e.Event != "MIGRATION" {
		return e.Event
	}
	var details struct {
		Status string `json:"status"`
	}
	if json.Unmarshal(e.Details, &details) != nil {
		return ""
	}
	return details.Status
}

// sent is when QEMU sent an event.
func sent(e lv.DomainEvent) time.Time {
	return time.Unix(int64(e.Seconds), int64(e.Microseconds)*int64(time.Microsecond))
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

// SaveState returns when all of the device state has gone to the writer of
// Suspend.
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
	for {
		select {
		case e, ok := <-p.events:
			if !ok {
				return errDisconnected
			}
			if st := status(e); st == "failed" || st == "cancelled" || st == "cancelling" {
				return s.failure(ctx)
			}
		case <-p.stream.done:
			// QEMU closes its end when it has completed, or has failed: what
			// its destination makes of the state tells which.
			return p.stream.err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
