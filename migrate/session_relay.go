package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"
)

func (s *session) relayed() bool { return s.offer.Mode == Relay }

// openRelay makes the assembly of a relayed stream.
func (s *session) openRelay(ctx context.Context) error {
	a, err := newAssembly(s.offer.Streams)
	if err != nil {
		return err
	}
	if err := s.r.Ledger.Prepare(ctx, s.offer.Handover); err != nil {
		a.close()
		return fmt.Errorf("note the shell: %w", err)
	}
	s.assembly = a
	s.accept(a.serve)
	return s.sayPrepared()
}

// receiveRelayed has the hypervisor load the guest as it comes, and returns how
// long that took from the stream's end.
func (s *session) receiveRelayed(ctx context.Context) (time.Duration, error) {
	unblock := context.AfterFunc(ctx, func() {
		s.assembly.fail(context.Cause(ctx))
		s.hangUp()
	})
	defer unblock()
	select {
	case <-s.assembly.started:
	case <-s.shell.Lost():
		return 0, errShellLost
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	if err := s.shell.LoadState(ctx, s.assembly, answerWriter{s}); err != nil {
		return 0, fmt.Errorf("load the guest: %w", err)
	}
	at := s.assembly.endedAt()
	if at.IsZero() {
		return 0, errors.New("load the guest: the hypervisor did not read all of it")
	}
	load := time.Since(at)
	select {
	case <-s.halted:
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.complete = true
	return load, nil
}

// relayStopped notes that the guest stands still.
func (s *session) relayStopped(pass uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if pass == 0 || s.final != 0 {
		return violation("last pass %d", pass)
	}
	s.final = pass
	s.enter(DestFinal)
	close(s.halted)
	return nil
}

// answerWriter sends what the shell's hypervisor says to the source's.
type answerWriter struct{ s *session }

func (w answerWriter) Write(p []byte) (int, error) {
	for n := 0; n < len(p); n += maxAnswer {
		if err := w.s.ctl.raw(ctlAnswer, p[n:min(n+maxAnswer, len(p))]); err != nil {
			return n, err
		}
	}
	return len(p), nil
}
