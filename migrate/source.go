package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/lmctl/lmctl/dirtymap"
)

// The defaults of Options and of the peer timeout.
const (
	DefaultMaxPasses      = 8
	DefaultDowntimeTarget = 30 * time.Millisecond
	DefaultStreams        = 2
	DefaultPeerTimeout    = 5 * time.Second
)

// undoTimeout bounds each step of putting a guest back into life. It is long:
// there is nothing better to do than to go on trying.
const undoTimeout = 30 * time.Second

// source is one migration under way at the source.
type source struct {
	sender *Sender
	job    Job
	opts   Options
	log    *slog.Logger
	began  time.Time
	h      Handover
	report *Report

	mem     blocks
	peer    *peer
	streams *streams
	relayed RelayGuest // nil in direct mode
	carrier *carrier   // likewise, and until the passes begin
	passed  int64      // bytes that the carrier had taken at the end of the last pass
	tracker Tracker
	sent    []*dirtymap.Bitmap // pages that the destination has data for
	pending []*dirtymap.Bitmap // written, and not sent yet, when the passes end
	scratch []*dirtymap.Bitmap
	pass    int         // the newest pass
	left    PassOutcome // of the last live pass

	discards  bool      // pages may turn back into holes
	suspended bool      // Suspend was called
	stopped   time.Time // when the guest stopped
	committed bool      // the record stands, or may stand

	forwarding sync.WaitGroup

	stateBytes atomic.Int64 // device state sent

	telling sync.Mutex // keeps the observer's snapshots in order
	now     progressNow
}

// Migrate moves a running guest to another host. It returns when the guest
// runs there and this host has let go of it, or when it runs here as before,
// or when only the destination's record can tell; the error is an *Error that
// says which, nil for the first. The report is never nil.
//
// Cancelling ctx before the commit ends the migration with the guest on the
// source. A commit that has begun is finished.
//
// In doubt the guest stays suspended, and is the caller's: Resume it once the
// destination has withdrawn, Release it once the destination owns it.
func (s *Sender) Migrate(ctx context.Context, job Job) (*Report, error) {
	m := newSource(s, job)
	stop := m.watch()
	err := m.run(ctx)
	err = m.conclude(ctx, err)
	stop()
	return m.report, err
}

func newSource(s *Sender, job Job) *source {
	m := &source{sender: s, job: job, opts: job.Options, began: time.Now()}
	if m.opts.MaxPasses <= 0 {
		m.opts.MaxPasses = DefaultMaxPasses
	}
	if m.opts.DowntimeTarget <= 0 {
		m.opts.DowntimeTarget = DefaultDowntimeTarget
	}
	if m.opts.Streams <= 0 {
		m.opts.Streams = DefaultStreams
	}
	m.opts.Streams = min(m.opts.Streams, MaxStreams)
	m.h = Handover{
		ID: job.ID, Guest: job.Guest.Name(), UUID: job.Guest.UUID(),
		Source: s.Host, Destination: job.Destination, Epoch: job.Epoch + 1,
	}
	m.report = &Report{
		ID: job.ID, Guest: m.h.Guest, Source: s.Host, Destination: job.Destination,
		Mode: Direct, Passes: []Pass{},
	}
	log := s.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	m.log = log.With("guest", m.h.Guest, "migration", m.h.ID, "destination", m.h.Destination)
	m.now.state = SourcePreparing
	return m
}

// enter moves to the next state.
func (m *source) enter(s State) {
	m.log.Debug("migration state", "state", s)
	m.observe(func(n *progressNow) { n.state = s })
	failpoint("source", s)
}

// run takes the migration to its end or to its first error.
func (m *source) run(ctx context.Context) error {
	if m.opts.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, m.opts.Timeout, fmt.Errorf("not done within %v", m.opts.Timeout))
		defer cancel()
	}
	// work ends with the caller's wish or with the peer; life only with the
	// peer: it is for what must not be interrupted any more.
	life, endLife := context.WithCancelCause(context.WithoutCancel(ctx))
	work, endWork := context.WithCancelCause(ctx)
	defer endLife(nil)
	defer endWork(nil)
	lost := func(err error) { endLife(err); endWork(err) }

	steps := []struct {
		state State
		ctx   context.Context
		do    func(context.Context) error
	}{
		{SourcePreparing, work, func(ctx context.Context) error { return m.prepare(ctx, lost) }},
		{SourceTracking, work, m.by(m.track, m.relay)},
		{SourceCopying, work, m.by(m.precopy, m.relayPasses)},
		{SourceSuspending, work, m.by(m.suspend, m.relaySuspend)},
		{SourceFinalCopy, work, m.by(m.finalCopy, m.relayRest)},
		{SourceReadyWait, work, m.awaitReady},
		{SourceCommitting, life, m.commit},
		{SourceHandedOver, life, m.awaitOwned},
		{SourceReleasing, life, m.release},
	}
	for _, step := range steps {
		m.enter(step.state)
		if err := step.do(step.ctx); err != nil {
			return m.cause(step.ctx, life, err)
		}
	}
	return nil
}

// wordGrace is how long a broken stream waits for the destination's word of
// why it broke: that travels on another connection.
const wordGrace = 200 * time.Millisecond

// cause prefers what ended the work to what a step stumbled over because of it.
func (m *source) cause(ctx, life context.Context, err error) error {
	var broken *net.OpError
	if ctx.Err() == nil && errors.As(err, &broken) {
		timer := time.NewTimer(wordGrace)
		defer timer.Stop()
		select {
		case <-life.Done():
		case <-timer.C:
		}
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// prepare has the destination build the shell VM, and opens the streams.
func (m *source) prepare(ctx context.Context, lost func(error)) error {
	id, err := uuid.Parse(m.h.ID)
	if err != nil {
		return fmt.Errorf("migration id %q: %w", m.h.ID, err)
	}
	if m.sender.Host == m.job.Destination {
		return &Refusal{Reasons: []string{fmt.Sprintf("guest %q is on host %q already", m.h.Guest, m.sender.Host)}}
	}
	if err := m.choose(ctx); err != nil {
		return err
	}
	if m.relayed == nil {
		if err := m.open(ctx); err != nil {
			return err
		}
	}
	definition, err := m.job.Guest.Definition(ctx)
	if err != nil {
		return fmt.Errorf("describe the guest: %w", err)
	}
	m.peer, err = m.sender.connect(ctx, m.job.Dial, preamble{id: id}, lost)
	if err != nil {
		return fmt.Errorf("connect to host %q: %w", m.job.Destination, err)
	}
	offer := offerMsg{Handover: m.h, Definition: definition, Mode: m.report.Mode, Blocks: m.mem.infos(), Streams: m.opts.Streams, Verify: m.opts.Verify}
	if err := m.peer.ctl.send(ctlOffer, offer); err != nil {
		return err
	}
	var prepared preparedMsg
	if err := m.peer.await(ctx, ctlPrepared, &prepared); err != nil {
		return err
	}
	if err := m.job.Guest.Prepared(prepared.Answer); err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	m.streams, err = openStreams(ctx, m.job.Dial, preamble{id: id}, m.opts.Streams, m.mem, m.opts.Bandwidth)
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, m.streams.close) // a stream that is stuck in a write ends with the work
	return nil
}

// open maps the guest's memory.
func (m *source) open(ctx context.Context) error {
	memory, err := m.job.Guest.Memory(ctx)
	if err != nil {
		return fmt.Errorf("look up guest memory: %w", err)
	}
	if m.mem, err = mapMemory(memory, false); err != nil {
		return err
	}
	m.report.RAMBytes = m.mem.pages() * PageSize
	m.sent, m.scratch = m.mem.bitmaps(), m.mem.bitmaps()
	return nil
}

// release lets go of a guest that the destination owns.
func (m *source) release(ctx context.Context) error {
	// The guest is gone from here whatever goes wrong now, so nothing below
	// fails the migration; the agent's next start removes what may be left.
	m.forwarding.Wait()
	m.closeTracker()
	release, stop := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer stop()
	if err := m.job.Guest.Release(release); err != nil {
		m.log.Error("the moved guest's copy could not be removed", "error", err)
	}
	if err := m.sender.Ledger.Forget(release, m.h); err != nil {
		m.log.Error("the moved guest's record could not be removed", "error", err)
	}
	m.report.Total = time.Since(m.began)
	var a announcedMsg
	wait, stop := context.WithTimeout(ctx, undoTimeout)
	defer stop()
	if err := m.peer.await(wait, ctlAnnounced, &a); err != nil {
		m.log.Warn("no word of the announcement", "error", err)
	}
	if a.Error != "" {
		m.log.Warn("the guest's new place was not announced everywhere", "error", a.Error)
	}
	m.report.Announced = a.Addresses
	return nil
}

// conclude undoes what has to be undone and words the outcome.
func (m *source) conclude(ctx context.Context, err error) error {
	reached := m.now.state
	switch {
	case err == nil:
		m.report.Result = Completed
	case m.committed:
		m.report.Result = InDoubt
		m.forwarding.Wait()
		var back *withdrawnError
		if errors.As(err, &back) {
			err = m.reclaim(ctx, err)
		}
	default:
		m.report.Result = m.failure(ctx, reached, err)
		err = m.abort(ctx, err)
	}
	m.cleanUp()
	if m.report.Total == 0 {
		m.report.Total = time.Since(m.began)
	}
	if err == nil {
		m.enter(SourceDone)
		return nil
	}
	end := SourceAborted
	if m.report.Result == InDoubt {
		end = SourceInDoubt
	}
	m.enter(end)
	m.report.Error = err.Error()
	return &Error{Result: m.report.Result, State: reached, Err: err}
}

// failure tells the ways of not moving apart.
func (m *source) failure(ctx context.Context, reached State, err error) Result {
	var refusal *Refusal
	switch {
	case errors.As(err, &refusal):
		return Refused
	case ctx.Err() != nil && errors.Is(err, context.Cause(ctx)):
		return Cancelled
	case reached == SourcePreparing || reached == SourceTracking:
		return Refused
	}
	return Failed
}

// abort puts the guest back into life here. It comes before the commit, so no
// other copy of the guest can run.
func (m *source) abort(ctx context.Context, err error) error {
	m.enter(SourceAborting)
	var telling sync.WaitGroup
	if m.peer != nil {
		// At once, beside the resume and not in its way: what the shell holds, like
		// the lock of a disk, may be what the guest needs. Without the word the
		// destination finds out by itself, only later.
		reason := reasonMsg{Reason: err.Error()}
		telling.Go(func() { _ = m.peer.ctl.send(ctlAbort, reason) })
	}
	if m.suspended {
		err = errors.Join(err, m.resume(ctx))
	}
	telling.Wait()
	return err
}

// resume undoes Suspend. The wish that ended the migration does not end this.
func (m *source) resume(ctx context.Context) error {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer stop()
	err := m.job.Guest.Resume(ctx)
	if err != nil {
		err = fmt.Errorf("resume the guest on the source: %w", err)
	}
	if !m.stopped.IsZero() {
		m.report.Downtime = time.Since(m.stopped)
	}
	return errors.Join(err, m.sender.Ledger.Cancel(ctx, m.h))
}

// reclaim takes back a guest that the destination has durably withdrawn from.
func (m *source) reclaim(ctx context.Context, err error) error {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer stop()
	if e := m.sender.Ledger.Reclaim(ctx, m.h); e != nil {
		return errors.Join(err, fmt.Errorf("reclaim the guest: %w", e))
	}
	m.report.Result = Failed
	if e := m.job.Guest.Resume(ctx); e != nil {
		return errors.Join(err, fmt.Errorf("resume the guest on the source: %w", e))
	}
	m.report.Downtime = time.Since(m.stopped)
	return err
}

func (m *source) closeTracker() {
	if m.tracker == nil {
		return
	}
	if err := m.tracker.Close(); err != nil {
		m.log.Error("the tracker was not removed cleanly", "error", err)
	}
	m.tracker = nil
}

func (m *source) cleanUp() {
	m.forwarding.Wait()
	m.closeTracker()
	if m.streams != nil {
		m.report.BytesSent += m.streams.sent.Load()
		m.streams.close()
	}
	m.carrier.close()
	if m.peer != nil {
		m.report.BytesSent += m.peer.ctl.sent.Load()
		m.peer.close()
	}
	m.mem.unmap()
}
