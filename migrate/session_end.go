package migrate

import (
	"context"
	"errors"
	"time"
)

// decide waits for the word of a source that has been told that all is ready.
func (s *session) decide(ctx context.Context) (undecided bool, err error) {
	var word controlType
	select {
	case word = <-s.word:
	case <-s.shell.Lost():
	case <-ctx.Done():
	}
	// The word counts whatever came with it.
	select {
	case word = <-s.word:
	default:
	}
	switch word {
	case ctlCommit:
		return false, s.r.finish(ctx, s.incoming(), s.tell)
	case ctlAbort:
		return false, errors.Join(errAborted, s.destroy())
	}
	if context.Cause(ctx) != nil {
		return true, context.Cause(ctx)
	}
	// The source may be writing its record right now, so that it has to hear
	// something durable.
	return false, s.r.giveBack(context.WithoutCancel(ctx), s.incoming(), errShellLost, s.tell)
}

// tell sends a message that nothing depends on: a source that misses it asks.
func (s *session) tell(t controlType, m any) {
	if err := s.ctl.send(t, m); err != nil {
		s.log.Debug("could not tell the source", "message", t.String(), "error", err)
	}
}

// refuse answers an offer that this host cannot take, and returns why.
func (s *session) refuse(err error) error {
	if errors.Is(err, errAborted) {
		return err
	}
	var refusal *Refusal
	reasons := []string{err.Error()}
	if errors.As(err, &refusal) {
		reasons = refusal.Reasons
	}
	s.tell(ctlRefused, refusedMsg{Reasons: reasons})
	if s.listening == nil {
		s.linger()
	}
	return err
}

// giveUp removes a shell before the source was told that it is ready. The
// source cannot have committed, so nothing has to be remembered.
func (s *session) giveUp(ctx context.Context, err error) error {
	if !errors.Is(err, errAborted) {
		s.log.Warn("migration failed", "guest", s.offer.Handover.Guest, "error", err)
	}
	err = errors.Join(err, s.destroy())
	if !errors.Is(err, errAborted) {
		s.tell(ctlFailed, reasonMsg{Reason: err.Error()})
	}
	return err
}

// destroy removes a shell that will never run and all that was noted for it.
func (s *session) destroy() error {
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	if err := s.shell.Destroy(ctx); err != nil {
		return err
	}
	if err := s.r.Ledger.Drop(ctx, s.offer.Handover); err != nil {
		return err
	}
	s.enter(DestWithdrawn)
	return nil
}

// hangUp closes the data connections.
func (s *session) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.intake = nil // no further stream is due
	for _, c := range s.conns {
		c.Close()
	}
}

// errSessionOver ends what a hypervisor that has failed may still be given.
var errSessionOver = errors.New("the migration is over")

// closeStreams ends the data connections and lets go of the shell's memory.
func (s *session) closeStreams() {
	s.hangUp()
	s.assembly.fail(errSessionOver)
	s.gate.fail(errSessionOver)
	s.streams.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mem.unmap()
	s.mem = nil
	s.assembly.close()
}

// lingerFor is how long the source has to close a connection that has served
// its purpose. Closing it first, with something of the source's unread, would
// make the kernel throw away what the source has not read yet.
const lingerFor = 2 * time.Second

func (s *session) linger() {
	if s.listening == nil {
		deadline := time.Now().Add(lingerFor)
		for {
			if _, _, err := s.ctl.recvBefore(deadline); err != nil {
				return
			}
		}
	}
	timer := time.NewTimer(lingerFor)
	defer timer.Stop()
	select {
	case <-s.listening:
	case <-timer.C:
		s.ctl.close()
		<-s.listening
	}
}
