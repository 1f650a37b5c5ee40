package libvirt

import (
	"context"
	"fmt"
	"io"
	"net"
	"time"

	lv "github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"

	"github.com/lmctl/lmctl/migrate"
)

var _ migrate.RelayGuest = (*Guest)(nil)

// relayReasons says what keeps QEMU from copying a domain's memory by itself.
// What devices have against it QEMU and libvirt say themselves.
func relayReasons(x *libvirtxml.Domain) []string {
	if x == nil {
		return nil
	}
	var reasons []string
	if x.Type == "qemu" {
		// Seen: list corruption in the kernel of a guest that writes 40 MB in a
		// loop, in 2 of 5 of QEMU's own migrations under TCG.
		reasons = append(reasons, "QEMU's own migration can corrupt the memory of an emulated guest (a domain of type qemu); give it shared memory, so that it moves in direct mode: <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>")
	}
	if x.Devices != nil && len(x.Devices.Shmems) > 0 {
		reasons = append(reasons, "the device shmem cannot be moved: its memory is shared with other processes of this host; detach it first")
	}
	return reasons
}

// Relay has libvirt migrate the domain, memory and all, through conn. It returns
// when QEMU has begun.
func (s *Guest) Relay(ctx context.Context, conn io.ReadWriter, target time.Duration) (ram int64, err error) {
	if err := s.relay(ctx, conn, target); err != nil {
		return 0, fmt.Errorf("relay guest %s: %w", s.g.name, err)
	}
	return s.g.info().Memory, nil
}

func (s *Guest) relay(ctx context.Context, conn io.ReadWriter, target time.Duration) error {
	if s.suspension != nil {
		return errSuspended
	}
	l, err := s.g.d.conn.get()
	if err != nil {
		return err
	}
	if err := s.note(ctx, l, suspensionRecord{Name: s.g.name, UUID: s.g.uuid, Relayed: true}); err != nil {
		return err
	}
	s.relaying = true
	if err := s.perform(l, func(qemu *net.UnixConn) error { return s.exchange(qemu, conn) }); err != nil {
		return err
	}
	p := s.suspension
	if err := s.await(ctx, func() bool { return p.standing || p.passes.under() }, nil); err != nil {
		return err
	}
	// Not before: when its migration ends here, libvirt puts back what was there when
	// it began.
	s.allow(target)
	return nil
}

// relayBuffer is what is read from QEMU at a time, in bytes.
const relayBuffer = 256 << 10

// exchange passes on what QEMU says, until it has said all, and what its other
// side answers.
func (s *Guest) exchange(qemu *net.UnixConn, conn io.ReadWriter) error {
	s.answering.Go(func() {
		// It ends with the answers, or with QEMU's end of the connection; why
		// QEMU has ended that, its stream or libvirt say.
		_, _ = io.Copy(qemu, conn)
	})
	// The wrapper keeps Copy from choosing a way of its own, with a buffer of an
	// eighth of this.
	_, err := io.CopyBuffer(struct{ io.Writer }{conn}, struct{ io.Reader }{qemu}, make([]byte, relayBuffer))
	return err
}

// stopNow has QEMU stop the guest as soon as it can, if it has not.
func (s *Guest) stopNow(ctx context.Context) (time.Time, error) {
	p := s.suspension
	if !p.standing {
		s.allow(maxDowntime)
	}
	if err := s.await(ctx, func() bool { return p.standing }, nil); err != nil {
		return time.Time{}, err
	}
	s.caught.Stopped(p.stopped)
	return p.stopped, nil
}

// passes are QEMU's own, as its events tell of them.
type passes struct {
	beginnings []happening // of those whose predecessor was not told of yet
	since      time.Time   // when the one under way began
	pages      jobPages    // that had been sent then
}

// begun notes that a pass begins.
func (p *passes) begun(h happening) {
	if p.since.IsZero() {
		p.since = h.at
		return
	}
	p.beginnings = append(p.beginnings, h)
}

// under says whether a pass is under way.
func (p *passes) under() bool { return !p.since.IsZero() }

// AwaitPass returns when QEMU has finished a pass. QEMU goes on while it is asked
// for the figures, so that a few pages of the next pass may count as this one's.
func (s *Guest) AwaitPass(ctx context.Context) (migrate.RelayPass, error) {
	p := s.suspension
	err := s.await(ctx, func() bool { return p.standing || len(p.passes.beginnings) > 0 }, nil)
	if err != nil {
		return migrate.RelayPass{}, err
	}
	if len(p.passes.beginnings) == 0 {
		return s.passOver(ctx, p.stopped, true)
	}
	next := p.passes.beginnings[0]
	p.passes.beginnings = p.passes.beginnings[1:]
	return s.passOver(ctx, next.at, false)
}

// passOver is the account of a pass that another has ended, or the stop.
func (s *Guest) passOver(ctx context.Context, at time.Time, stopped bool) (migrate.RelayPass, error) {
	p := s.suspension
	now, err := s.g.jobPages(ctx, p.l)
	if err != nil {
		return migrate.RelayPass{}, fmt.Errorf("figures of QEMU's migration: %w", err)
	}
	before := p.passes.pages
	pass := migrate.Pass{
		Pages: now.sent - before.sent, ZeroPages: now.zero - before.zero,
		Duration: max(at.Sub(p.passes.since), 0), DirtyAfter: now.remaining,
	}
	p.passes.since, p.passes.pages = at, now
	return migrate.RelayPass{Pass: pass, Stopped: stopped}, nil
}

// jobPages are the figures of libvirt's job, in pages.
type jobPages struct{ sent, zero, remaining int64 }

// jobPages asks libvirt, which asks QEMU.
func (g *domain) jobPages(ctx context.Context, l *link) (jobPages, error) {
	params, err := call(ctx, l, func(l *link) ([]lv.TypedParam, error) {
		_, params, err := l.DomainGetJobStats(g.ref(), 0)
		return params, err
	})
	if err != nil {
		return jobPages{}, err
	}
	return pagesOf(params), nil
}

// pagesOf reads the figures that count here; those that are missing are zero.
func pagesOf(params []lv.TypedParam) jobPages {
	figures := make(map[string]int64)
	for _, p := range params {
		if n, ok := p.Value.I.(uint64); ok {
			figures[p.Field] = int64(min(n, 1<<62))
		}
	}
	zero := figures[lv.DomainJobMemoryConstant]
	return jobPages{sent: figures[lv.DomainJobMemoryNormal] + zero, zero: zero, remaining: figures[lv.DomainJobMemoryRemaining] / migrate.PageSize}
}

// relayMode says in which mode a domain would move that has obstacles to direct
// mode, and why.
func relayMode(x *libvirtxml.Domain, obstacles string) (mode, why string) {
	if reasons := relayReasons(x); len(reasons) > 0 {
		return "", obstacles
	}
	return string(migrate.Relay), "QEMU copies its memory itself: " + obstacles
}
