package migrate

import (
	"context"
	"fmt"
	"time"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/internal/sys"
)

// track attaches the tracker. From its first look on, no write is missed.
func (m *source) track(ctx context.Context) error {
	// Asked now, once: while the device state is saved the hypervisor does not
	// answer, and the guest would wait for it.
	discards, err := m.job.Guest.Discards(ctx)
	if err != nil {
		return fmt.Errorf("ask for discarded pages: %w", err)
	}
	m.discards = discards
	t, err := m.sender.Track(m.job.Guest.Process(), m.mem.regions())
	if err != nil {
		return fmt.Errorf("track dirty pages: %w", err)
	}
	m.tracker = t
	return nil
}

// precopy runs the live passes: each is scan, drain, copy.
//
// The order matters. A disk read by direct I/O pins guest pages when it is
// submitted and writes them, unseen by the tracker, when it completes. One that
// was pinned before the scan has landed when the drain returns, and so before
// the copy; one that is pinned after the scan marks its pages again.
func (m *source) precopy(ctx context.Context) error {
	policy := Policy{MaxPasses: m.opts.MaxPasses, DowntimeTarget: m.opts.DowntimeTarget}
	todo, written := m.mem.bitmaps(), m.mem.bitmaps()
	if err := m.tracker.Collect(written); err != nil {
		return fmt.Errorf("pass 1: scan: %w", err)
	}
	if err := m.mem.present(todo); err != nil {
		return fmt.Errorf("pass 1: %w", err)
	}
	for m.pass = 1; ; m.pass++ {
		if err := m.job.Guest.Drain(ctx); err != nil {
			return fmt.Errorf("pass %d: drain: %w", m.pass, err)
		}
		p, outcome, err := m.copyPass(ctx, todo)
		if err != nil {
			return fmt.Errorf("pass %d: %w", m.pass, err)
		}
		reset(written)
		if err := m.tracker.Collect(written); err != nil {
			return fmt.Errorf("pass %d: scan: %w", m.pass, err)
		}
		if err := m.settle(written); err != nil {
			return fmt.Errorf("pass %d: %w", m.pass, err)
		}
		p.DirtyAfter = count(written)
		outcome.DirtyAfter = p.DirtyAfter
		if outcome.Speed == 0 {
			outcome.Speed = m.left.Speed
		}
		m.left = outcome
		m.finished(p)
		if reason := policy.Next(outcome); reason != "" {
			m.pending = written
			m.report.SwitchoverReason = reason
			return nil
		}
		todo, written = written, todo
	}
}

// copyPass sends the pages of todo while the guest runs, and returns when the
// destination has them.
func (m *source) copyPass(ctx context.Context, todo []*dirtymap.Bitmap) (Pass, PassOutcome, error) {
	begin := time.Now()
	m.observe(func(n *progressNow) {
		m.streams.copied.Store(0)
		n.pass, n.pages, n.from, n.began = m.pass, count(todo), m.streams.sent.Load(), begin
	})
	t, err := m.streams.send(ctx, m.pass, todo, true)
	if err != nil {
		return Pass{}, PassOutcome{}, err
	}
	if err := m.awaitPass(ctx, m.pass); err != nil {
		return Pass{}, PassOutcome{}, err
	}
	for i := range todo {
		m.sent[i].Union(todo[i])
	}
	p := Pass{N: m.pass, Pages: t.pages, ZeroPages: t.zero, Bytes: t.bytes, Duration: time.Since(begin)}
	o := PassOutcome{Sent: t.pages}
	// Below a megabyte the round trip of the pass's end is most of the time.
	if data := t.pages - t.zero; data >= 256 {
		o.Speed = float64(data) / max(p.Duration-t.limited, time.Microsecond).Seconds()
	}
	return p, o, nil
}

// awaitPass waits until every stream's pages of the pass are in place.
func (m *source) awaitPass(ctx context.Context, pass int) error {
	var done passDoneMsg
	if err := m.peer.await(ctx, ctlPassDone, &done); err != nil {
		return err
	}
	if done.Pass != uint32(pass) {
		return violation("pass %d done, pass %d is under way", done.Pass, pass)
	}
	return nil
}

// settle makes what the tracker reported exact. The tracker may report pages
// that were never touched, when page tables come into being around one that
// was: those are holes at both ends, and reading them would fill them. And
// pages that turned back into holes may not be reported at all.
func (m *source) settle(written []*dirtymap.Bitmap) error {
	if m.discards {
		if err := m.addDiscarded(written); err != nil {
			return err
		}
	}
	for i, b := range m.mem {
		fresh := m.scratch[i]
		fresh.Reset()
		fresh.Union(written[i])
		fresh.Subtract(m.sent[i])
		for first, n, ok := fresh.NextRun(0); ok; first, n, ok = fresh.NextRun(first + n) {
			written[i].ClearRange(first, first+n)
			lo, hi := int64(first)*PageSize, int64(first+n)*PageSize
			for run, err := range sys.DataRuns(b.File, lo, hi) {
				if err != nil {
					return fmt.Errorf("find the holes of memory block %q: %w", b.Name, err)
				}
				written[i].SetRange(pageRange(run))
			}
		}
	}
	return nil
}

// addDiscarded adds the pages that the destination has data for and that are
// holes here by now.
func (m *source) addDiscarded(written []*dirtymap.Bitmap) error {
	present := m.mem.bitmaps()
	if err := m.mem.present(present); err != nil {
		return err
	}
	for i := range written {
		gone := m.scratch[i]
		gone.Reset()
		gone.Union(m.sent[i])
		gone.Subtract(present[i])
		written[i].Union(gone)
	}
	return nil
}

// finished adds a pass to the account.
func (m *source) finished(p Pass) {
	m.report.Passes = append(m.report.Passes, p)
	m.log.Info("pass finished", "pass", p.N, "pages", p.Pages, "zero_pages", p.ZeroPages,
		"bytes", p.Bytes, "duration", p.Duration, "dirty_after", p.DirtyAfter)
	passes := append([]Pass(nil), m.report.Passes...)
	m.observe(func(n *progressNow) { n.passes = passes })
}

func count(maps []*dirtymap.Bitmap) (n int64) {
	for _, b := range maps {
		n += int64(b.Count())
	}
	return n
}

func reset(maps []*dirtymap.Bitmap) {
	for _, b := range maps {
		b.Reset()
	}
}
