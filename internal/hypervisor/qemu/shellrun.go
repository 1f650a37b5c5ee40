package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/lmctl/lmctl/migrate"
)

// Resume connects the guest's network and starts its CPUs. When it returns nil
// they run; what is left to do with QEMU's settings and the record is done
// behind its back, so as not to stand in the guest's pause. On an error with
// migrate.ErrNotStarted the guest was not started and may still be; after any
// other it may have been. Either way the shell then holds the guest no more, so
// that nobody waits for this caller: see ShellOf.
func (s *Shell) Resume(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ran {
		return nil
	}
	if err := s.run(ctx); err != nil {
		s.mayHaveRun = s.mayHaveRun || !errors.Is(err, migrate.ErrNotStarted)
		err = errors.Join(err, s.letGo())
		s.done()
		return fmt.Errorf("run guest %s: %w", s.v.def.Name, err)
	}
	s.ran = true
	s.v.d.wg.Go(s.settleIn)
	return nil
}

func (s *Shell) run(ctx context.Context) error {
	for i := range s.v.def.NICs {
		if err := s.v.d.raiseTap(tapName(s.v.def.UUID, i)); err != nil {
			return s.unplug(err)
		}
	}
	if err := s.startCPUs(ctx); err != nil {
		return err
	}
	// cont has started the CPUs when it answers.
	runstate, err := s.v.queryStatus(ctx, s.inst)
	if err != nil {
		return err
	}
	if runstate != "running" && !terminal(runstate) {
		return fmt.Errorf("QEMU says it is %s, not running", runstate)
	}
	return nil
}

func (s *Shell) startCPUs(ctx context.Context) error {
	if s.mayHaveRun {
		if runstate, err := s.v.queryStatus(ctx, s.inst); err != nil || hasRun(runstate) {
			return err
		}
	}
	if !s.mayHaveRun && s.inst.proc.dead() { // else QEMU's silence would not say so
		return s.unplug(errors.New("its QEMU has ended"))
	}
	// The mark is for the next agent, should this one die now. It need not
	// outlive the host, as QEMU does not.
	if err := os.WriteFile(s.v.files.resumed(), nil, 0o600); err != nil {
		return s.unplug(err)
	}
	err := s.v.monitor(s.inst).run(ctx, "cont", nil, nil)
	var refused *commandError
	if !errors.As(err, &refused) {
		s.mayHaveRun = true
		return err
	}
	// A disk could not be opened or locked.
	if s.mayHaveRun {
		return err
	}
	return errors.Join(s.unplug(err), removeIfThere(s.v.files.resumed()))
}

// unplug takes the taps of a guest that was not started out of the network.
func (s *Shell) unplug(cause error) error {
	if s.mayHaveRun {
		return cause
	}
	cause = fmt.Errorf("%w: %w", migrate.ErrNotStarted, cause)
	for i := range s.v.def.NICs {
		if err := s.v.d.lowerTap(tapName(s.v.def.UUID, i)); err != nil {
			cause = fmt.Errorf("%w; %w", cause, err)
		}
	}
	return cause
}

// settleIn makes the shell a guest like any other.
func (s *Shell) settleIn() {
	defer s.done()
	v := s.v
	if err := s.giveUp(); err != nil {
		v.d.log.Warn("close what the shell held", "guest", v.def.Name, "error", err)
	}
	if err := v.settleIn(v.d.ctx, s.inst); err != nil {
		v.d.log.Error("make the shell an ordinary guest", "guest", v.def.Name, "error", err)
	}
	v.learn()
	v.refresh(v.d.ctx, s.inst)
}

// settleIn puts QEMU's settings back and takes the mark off the guest.
func (v *vm) settleIn(ctx context.Context, inst *instance) error {
	if err := v.restore(ctx, v.monitor(inst)); err != nil {
		return err
	}
	if err := v.updateRecord(func(r *record) { r.Incoming = false }); err != nil {
		return err
	}
	return removeIfThere(v.files.resumed())
}
