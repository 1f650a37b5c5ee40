package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
)

// switchoverTimeout bounds the time that the guest stands still before the
// commit, apart from verification: a hypervisor that hangs must not keep it
// stopped for ever.
const switchoverTimeout = 10 * time.Second

// verifyTimeout is added for each GiB of memory when the pages are verified.
const verifyTimeout = 10 * time.Second

// fits refuses to stop a guest whose rest cannot be sent in the time that it
// may stand still.
func (m *source) fits() error {
	left, speed := m.left.DirtyAfter, m.left.Speed
	if speed <= 0 {
		return nil
	}
	need := time.Duration(float64(left) / speed * float64(time.Second))
	if need <= switchoverTimeout/2 {
		return nil
	}
	return fmt.Errorf("the guest writes faster than the network carries: %d MiB would be left, and take about %v with the guest stopped; give it more bandwidth, or migrate when it writes less",
		left*PageSize>>20, need.Round(100*time.Millisecond))
}

// suspend stops the guest. The device state that does not depend on the stop
// has been on its way before that.
func (m *source) suspend(ctx context.Context) error {
	if err := m.fits(); err != nil {
		return err
	}
	if err := m.sender.Ledger.Begin(ctx, m.h); err != nil {
		return fmt.Errorf("note the switchover: %w", err)
	}
	m.suspended = true
	stopped, err := m.job.Guest.Suspend(ctx, &stateWriter{m: m})
	m.stopped = stopped
	if err != nil {
		return fmt.Errorf("suspend: %w", err)
	}
	m.report.DowntimeParts.Stop = time.Since(stopped)
	m.pass++
	return m.peer.ctl.send(ctlStopped, stoppedMsg{Pass: uint32(m.pass)})
}

// stateWriter sends device state to the destination.
type stateWriter struct{ m *source }

func (w *stateWriter) Write(p []byte) (int, error) {
	for n := 0; n < len(p); {
		chunk := p[n:min(n+maxStateChunk, len(p))]
		if err := w.m.peer.ctl.raw(ctlState, chunk); err != nil {
			return n, err
		}
		n += len(chunk)
		w.m.stateBytes.Add(int64(len(chunk)))
	}
	return len(p), nil
}

// finalCopy sends the last pages and the device state side by side, and
// verifies if asked to.
func (m *source) finalCopy(ctx context.Context) error {
	limit := switchoverTimeout
	if m.opts.Verify {
		limit += verifyTimeout * time.Duration(1+m.report.RAMBytes>>30)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the switchover took longer than %v", limit))
	defer cancel()
	g, work := errgroup.WithContext(ctx)
	g.Go(func() error { return m.finalPages(work) })
	g.Go(func() error {
		begin := time.Now()
		if err := m.job.Guest.SaveState(work); err != nil {
			return fmt.Errorf("save device state: %w", err)
		}
		m.report.DowntimeParts.StateSave = time.Since(begin)
		m.report.DowntimeParts.StateBytes = m.stateBytes.Load()
		return m.peer.ctl.send(ctlStateEnd, stateEndMsg{Bytes: m.stateBytes.Load()})
	})
	if err := g.Wait(); err != nil {
		return or(ctx, err)
	}
	if m.opts.Verify {
		return or(ctx, m.verify(ctx))
	}
	return nil
}

// or prefers the reason why a context ended to what failed because of it.
func or(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return cause
	}
	return err
}

// finalPages takes the last bitmap and sends what it says and what the last
// live pass left.
func (m *source) finalPages(ctx context.Context) error {
	begin := time.Now()
	// Nothing runs any more, so there is nothing to protect again.
	if err := m.tracker.Peek(m.pending); err != nil {
		return fmt.Errorf("last scan: %w", err)
	}
	if err := m.settle(m.pending); err != nil {
		return fmt.Errorf("last scan: %w", err)
	}
	m.report.DowntimeParts.FinalScan = time.Since(begin)
	begin = time.Now()
	t, err := m.streams.send(ctx, m.pass, m.pending, false)
	if err != nil {
		return fmt.Errorf("last pages: %w", err)
	}
	if err := m.awaitPass(ctx, m.pass); err != nil {
		return err
	}
	m.report.DowntimeParts.FinalCopy = time.Since(begin)
	m.report.DowntimeParts.FinalPages = t.pages
	return nil
}

// verify compares every page of both sides.
func (m *source) verify(ctx context.Context) error {
	begin := time.Now()
	m.pass++
	if _, err := m.streams.sendHashes(ctx, m.pass); err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	if err := m.awaitPass(ctx, m.pass); err != nil {
		return err
	}
	var v verifiedMsg
	if err := m.peer.await(ctx, ctlVerified, &v); err != nil {
		return err
	}
	m.report.VerifiedPages = v.Pages
	m.report.DowntimeParts.Verify = time.Since(begin)
	return v.check(m.mem.pages())
}

// awaitReady waits for the destination to load the state.
func (m *source) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, switchoverTimeout, fmt.Errorf("the destination took longer than %v to load the device state", switchoverTimeout))
	defer cancel()
	var r readyMsg
	if err := m.peer.await(ctx, ctlReady, &r); err != nil {
		return err
	}
	m.report.DowntimeParts.StateLoad = r.Load
	return nil
}

// commit makes the destination the owner. It is the one point at which the
// guest passes over.
func (m *source) commit(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil {
		return err // a destination that is gone already cannot be handed a guest
	}
	begin := time.Now()
	// The connection may go while the record is being written; the record is
	// finished all the same.
	err := m.sender.Ledger.HandOver(context.WithoutCancel(ctx), m.h)
	if errors.Is(err, ErrNotHandedOver) {
		return fmt.Errorf("commit: %w", err)
	}
	m.committed = true
	if err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	m.report.DowntimeParts.Commit = time.Since(begin)
	m.enter(SourceCommitted)
	return m.peer.ctl.send(ctlCommit, nil)
}

// ownedTimeout bounds the wait for a destination that answers, but does not
// get the guest to run: the two agents settle it afterwards.
const ownedTimeout = 2 * finishTimeout

// awaitOwned waits until the guest runs at the destination, and then until the
// destination is durably its owner.
func (m *source) awaitOwned(ctx context.Context) error {
	wait, cancel := context.WithTimeoutCause(ctx, ownedTimeout, fmt.Errorf("no word in %v of whether the guest runs at the destination", ownedTimeout))
	defer cancel()
	var r runningMsg
	if err := m.peer.await(wait, ctlRunning, &r); err != nil {
		return err
	}
	if r.Error == "" {
		m.report.Downtime = time.Since(m.stopped)
		m.report.DowntimeParts.Resume = r.Resume
		m.forwarding.Go(func() { m.forward(ctx) })
	} else {
		// The guest is the destination's all the same: it may have run.
		m.report.Error = "at the destination: " + r.Error
		m.log.Error("the guest was handed over, but may not run", "error", r.Error)
	}
	return m.peer.await(wait, ctlOwned, nil)
}

// forwardFor is how long frames that still arrive here are sent after the
// guest: the announcement reaches a local network well within it.
const forwardFor = 20 * time.Millisecond

// forward sends what waits here for the guest's network after it. Its clients
// would otherwise wait for a retransmission, many times the downtime.
func (m *source) forward(ctx context.Context) {
	ctx, stop := context.WithTimeout(ctx, forwardFor)
	defer stop()
	n, err := m.job.Guest.Forward(ctx)
	if err != nil {
		m.log.Warn("frames that waited for the guest were lost", "forwarded", n, "error", err)
	} else if n > 0 {
		m.log.Debug("forwarded frames that waited for the guest", "frames", n)
	}
}
