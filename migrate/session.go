package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
)

// session is one migration under way at the destination.
type session struct {
	r     *Receiver
	id    uuid.UUID
	peer  string
	log   *slog.Logger
	ctl   *control
	gate  *gate
	word  chan controlType // commit or abort
	said  bool             // it has come; the listener's
	ready atomic.Bool      // ready was sent, or is about to be
	// prepared was sent, or is about to be: state may come.
	prepared atomic.Bool
	offer    offerMsg
	shell    Shell
	mem      blocks

	mu       sync.Mutex
	intake   func(index int, conn io.Reader) error // nil before prepared and after the streams are closed
	conns    map[int]net.Conn
	taken    int    // stream indexes used
	final    uint32 // the last pass, 0 while the guest runs
	last     uint32 // the newest pass that is in place
	sum      checked
	pagesAt  time.Time // when the last page was in place
	complete bool      // nothing more is due on the streams
	end      context.CancelCauseFunc

	// In relay mode, where there is no gate and no memory of ours.
	assembly *assembly
	halted   chan struct{} // closed when the guest stands still

	listening chan struct{} // closed when the listener has ended
	streams   sync.WaitGroup
}

func (s *session) incoming() Incoming { return Incoming{Handover: s.offer.Handover, Shell: s.shell} }

func (s *session) enter(st State) { s.r.enter(s.offer.Handover, st) }

// errAborted ends a session whose source keeps the guest.
var errAborted = errors.New("the source ended the migration")

// run takes the session to its end. undecided says that the shell still stands
// and that the source's record has to be read.
func (s *session) run(ctx context.Context) (undecided bool, err error) {
	if err := s.readOffer(); err != nil {
		return false, s.refuse(err)
	}
	ctx, s.end = context.WithCancelCause(ctx)
	s.listening = make(chan struct{})
	go func() {
		defer close(s.listening)
		s.end(s.listen())
	}()
	defer func() {
		s.linger()
		s.end(nil)
	}()

	s.enter(DestPreparing)
	if err := s.prepare(ctx); err != nil {
		return false, s.refuse(or(ctx, err))
	}
	s.enter(DestReceiving)
	load, err := s.receive(ctx)
	// After the guest runs, not before: to unmap its memory takes milliseconds.
	defer s.closeStreams()
	if err != nil {
		s.end(err) // before what follows from it, in case nothing came first
		s.closeStreams()
		return false, s.giveUp(ctx, or(ctx, err))
	}
	s.ready.Store(true)
	s.enter(DestReady)
	if err := s.ctl.send(ctlReady, readyMsg{Load: load}); err != nil {
		s.end(err)
	}
	return s.decide(ctx)
}

// readOffer reads the first frame.
func (s *session) readOffer() error {
	t, body, err := s.ctl.recvBefore(time.Now().Add(s.ctl.timeout))
	if err != nil {
		return err
	}
	if t != ctlOffer {
		return violation("%v before the offer", t)
	}
	if err := decodeBody(t, body, &s.offer); err != nil {
		return err
	}
	return s.offer.check(s.id, s.peer, s.r.Name)
}

// prepare builds the shell and makes the intake for its memory.
func (s *session) prepare(ctx context.Context) error {
	h := s.offer.Handover
	shell, err := s.r.Host.Prepare(ctx, Offer{
		Migration: h.ID, Source: h.Source, Guest: h.Guest, UUID: h.UUID, Epoch: h.Epoch,
		Definition: s.offer.Definition, Mode: s.offer.Mode, Blocks: s.offer.Blocks,
	})
	if err != nil {
		return err
	}
	s.shell = shell
	open := s.open
	if s.relayed() {
		open = s.openRelay
	}
	if err := open(ctx); err != nil {
		return errors.Join(err, s.destroy())
	}
	return nil
}

func (s *session) open(ctx context.Context) error {
	memory, err := ordered(s.shell.Memory(), s.offer.Blocks)
	if err != nil {
		return err
	}
	if s.mem, err = mapMemory(memory, true); err != nil {
		return err
	}
	if err := s.mem.clear(); err != nil {
		s.mem.unmap()
		return err
	}
	if err := s.r.Ledger.Prepare(ctx, s.offer.Handover); err != nil {
		s.mem.unmap()
		return fmt.Errorf("note the shell: %w", err)
	}
	in := newIntake(s.mem, s.offer.Streams, s.passDone)
	s.accept(func(_ int, conn io.Reader) error { return in.serve(conn) })
	return s.sayPrepared()
}

// accept lets data connections in.
func (s *session) accept(intake func(index int, conn io.Reader) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.intake = intake
}

func (s *session) sayPrepared() error {
	s.prepared.Store(true)
	if err := s.ctl.send(ctlPrepared, preparedMsg{Answer: s.shell.Answer()}); err != nil {
		s.closeStreams()
		return err
	}
	return nil
}

// ordered puts the shell's memory in the order of the offer.
func ordered(have []Memory, want []BlockInfo) ([]Memory, error) {
	byName := make(map[string]Memory, len(have))
	for _, m := range have {
		byName[m.Name] = m
	}
	out := make([]Memory, 0, len(want))
	for _, w := range want {
		m, ok := byName[w.Name]
		switch {
		case !ok:
			return nil, &Refusal{Reasons: []string{fmt.Sprintf("the shell VM has no memory block %q: define the guest alike on both hosts", w.Name)}}
		case m.Size != w.Size:
			return nil, &Refusal{Reasons: []string{fmt.Sprintf("memory block %q has %d bytes at the source and %d here", w.Name, w.Size, m.Size)}}
		}
		out = append(out, m)
	}
	if len(have) != len(want) {
		return nil, &Refusal{Reasons: []string{fmt.Sprintf("the guest has %d memory blocks at the source and %d here", len(want), len(have))}}
	}
	return out, nil
}

// receive loads the device state once every page is in place, and returns how
// long that took from there.
func (s *session) receive(ctx context.Context) (time.Duration, error) {
	if s.relayed() {
		return s.receiveRelayed(ctx)
	}
	unblock := context.AfterFunc(ctx, func() {
		s.gate.fail(context.Cause(ctx))
		s.hangUp()
	})
	defer unblock()
	select {
	case <-s.gate.started:
	case <-s.shell.Lost():
		return 0, errShellLost
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	if err := s.shell.LoadState(ctx, s.gate, nil); err != nil {
		return 0, fmt.Errorf("load device state: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.complete {
		// The gate holds the end of the state back until all is in place.
		return 0, errors.New("load device state: the hypervisor did not read all of it")
	}
	return time.Since(s.pagesAt), nil
}

var errShellLost = errors.New("the shell VM's process has ended")

// listen handles control frames until the connection ends.
func (s *session) listen() error {
	for {
		t, body, err := s.ctl.recv()
		if err != nil {
			return err
		}
		switch t {
		case ctlState:
			switch {
			case !s.prepared.Load():
				err = violation("device state before prepared")
			case s.relayed():
				err = violation("device state in relay mode")
			default:
				err = s.gate.write(body)
			}
		case ctlStopped:
			var m stoppedMsg
			if err = decodeBody(t, body, &m); err == nil {
				err = s.guestStopped(m.Pass)
			}
		case ctlStateEnd:
			var m stateEndMsg
			if err = decodeBody(t, body, &m); err == nil {
				err = s.gate.end(m.Bytes)
			}
		case ctlCommit, ctlAbort:
			err = s.spoken(t, body)
		default:
			err = violation("%v from the source", t)
		}
		if err != nil {
			return err
		}
	}
}

// spoken takes the source's word, of which there is one.
func (s *session) spoken(t controlType, body []byte) error {
	var m reasonMsg
	switch {
	case s.said:
		return violation("%v after the word", t)
	case t == ctlCommit && !s.ready.Load():
		return violation("commit before ready")
	case t == ctlCommit && len(body) != 0:
		return violation("commit with a body")
	case t == ctlAbort:
		if err := decodeBody(t, body, &m); err != nil {
			return err
		}
	}
	s.said = true
	s.word <- t // there is room for the one
	if t == ctlAbort {
		return fmt.Errorf("%w: %s", errAborted, m.Reason)
	}
	return nil
}

// guestStopped notes which pass is the last.
func (s *session) guestStopped(pass uint32) error {
	if s.relayed() {
		return s.relayStopped(pass)
	}
	if err := s.gate.stopped(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// The streams may be ahead of this connection, by the pass that verifies.
	if pass == 0 || s.due(pass) < s.last {
		return violation("last pass %d after pass %d", pass, s.last)
	}
	s.final = pass
	s.enter(DestFinal)
	return s.advance()
}

// due is the pass after which nothing more comes on the streams, if final is
// the last that copies.
func (s *session) due(final uint32) uint32 {
	if s.offer.Verify {
		return final + 1
	}
	return final
}

// passDone is told by the intake that a pass is in place.
func (s *session) passDone(pass uint32, sum checked) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last, s.sum = pass, sum
	if err := s.ctl.send(ctlPassDone, passDoneMsg{Pass: pass}); err != nil {
		return err
	}
	return s.advance()
}

// advance opens the gate when all that it waits for has come. s.mu is held.
func (s *session) advance() error {
	if s.final == 0 || s.complete {
		return nil
	}
	if s.last < s.due(s.final) {
		return nil
	}
	if s.offer.Verify {
		v := verifiedMsg{Pages: s.sum.pages, Mismatches: s.sum.mismatches, First: s.sum.first}
		if err := s.ctl.send(ctlVerified, v); err != nil {
			return err
		}
		if err := v.check(s.mem.pages()); err != nil {
			return err
		}
	}
	s.complete, s.pagesAt = true, time.Now()
	s.enter(DestLoading)
	s.gate.release()
	return nil
}

// serveData handles one data connection.
func (s *session) serveData(conn net.Conn, index int) error {
	s.mu.Lock()
	in := s.intake
	if in == nil || index >= s.offer.Streams || s.taken&(1<<index) != 0 {
		s.mu.Unlock()
		return violation("data stream %d is not due", index)
	}
	s.taken |= 1 << index
	s.conns[index] = conn
	s.streams.Add(1)
	s.mu.Unlock()
	defer s.streams.Done()
	err := in(index, conn)
	s.mu.Lock()
	complete := s.complete
	delete(s.conns, index)
	s.mu.Unlock()
	if complete {
		return nil // however a stream ends that nothing was due on any more
	}
	err = fmt.Errorf("data stream %d: %w", index, err)
	s.end(err)
	return err
}
