package migrate

import (
	"context"
	"fmt"
	"io"
	"time"
)

// relayConn is what a hypervisor takes for its other side.
type relayConn struct {
	io.Reader // the answers
	io.Writer // the carrier
}

// relay has the hypervisor begin. From here on it may stop the guest by itself,
// so that the record of the switchover comes first.
func (m *source) relay(ctx context.Context) error {
	if err := m.sender.Ledger.Begin(ctx, m.h); err != nil {
		return fmt.Errorf("note the switchover: %w", err)
	}
	m.suspended = true
	var err error
	if m.carrier, err = newCarrier(ctx, m.streams, m.opts.Compress); err != nil {
		return err
	}
	m.report.RAMBytes, err = m.relayed.Relay(ctx, relayConn{m.peer.answers, m.carrier}, m.opts.DowntimeTarget)
	if err != nil {
		return fmt.Errorf("relay: %w", err)
	}
	return nil
}

// relayPasses follows the hypervisor's passes until the policy, or the
// hypervisor, says that they are enough.
func (m *source) relayPasses(ctx context.Context) error {
	policy := Policy{MaxPasses: m.opts.MaxPasses, DowntimeTarget: m.opts.DowntimeTarget}
	todo := m.report.RAMBytes / PageSize
	for m.pass = 1; ; m.pass++ {
		from := m.streams.sent.Load()
		m.observe(func(n *progressNow) {
			m.streams.copied.Store(0)
			n.pass, n.pages, n.from, n.began = m.pass, todo, from, time.Now()
		})
		p, err := m.relayed.AwaitPass(ctx)
		if err != nil {
			return fmt.Errorf("pass %d: %w", m.pass, err)
		}
		p.N, p.Bytes = m.pass, m.streams.sent.Load()-from
		m.passed = m.carrier.taken.Load()
		outcome := PassOutcome{Sent: p.Pages, DirtyAfter: p.DirtyAfter, Speed: m.left.Speed}
		if data := p.Pages - p.ZeroPages; data >= 256 && !m.carrier.limited.Load() {
			outcome.Speed = float64(data) / max(p.Duration, time.Microsecond).Seconds()
		}
		m.left = outcome
		if !p.Stopped || p.Pages > 0 {
			m.finished(p.Pass)
		} else {
			m.pass-- // the hypervisor has looked again, and found nothing to do
		}
		if p.Stopped {
			m.report.SwitchoverReason = Converged
			return nil
		}
		if reason := policy.Next(outcome); reason != "" {
			m.report.SwitchoverReason = reason
			return nil
		}
		todo = p.DirtyAfter
	}
}

// relaySuspend has the hypervisor stop the guest, if it has not by itself.
func (m *source) relaySuspend(ctx context.Context) error {
	if m.report.SwitchoverReason != Converged {
		if err := m.fits(); err != nil {
			return err
		}
	}
	m.carrier.limited.Store(false)
	stopped, err := m.relayed.Suspend(ctx, nil)
	m.stopped = stopped
	if err != nil {
		return fmt.Errorf("suspend: %w", err)
	}
	m.report.DowntimeParts.Stop = time.Since(stopped)
	m.pass++
	return m.peer.ctl.send(ctlStopped, stoppedMsg{Pass: uint32(m.pass)})
}

// relayRest waits until the destination's hypervisor has all of the guest.
func (m *source) relayRest(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, switchoverTimeout, fmt.Errorf("the switchover took longer than %v", switchoverTimeout))
	defer cancel()
	begin := time.Now()
	if err := m.relayed.SaveState(ctx); err != nil {
		return or(ctx, fmt.Errorf("send the rest: %w", err))
	}
	if err := m.carrier.end(); err != nil {
		return or(ctx, fmt.Errorf("send the rest: %w", err))
	}
	m.report.DowntimeParts.StateSave = time.Since(begin)
	m.report.DowntimeParts.StateBytes = m.carrier.taken.Load() - m.passed
	return nil
}
