package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"sync"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/migrate"
)

// Shell is a guest on its way to this host. It holds the guest for one
// operation until it runs, is destroyed or is closed.
type Shell struct {
	v    *vm
	inst *instance
	lost chan struct{}
	done func()

	mu     sync.Mutex
	file   *os.File      // the memory file, nil once it is given up
	stream *net.UnixConn // our end of QEMU's incoming stream, nil if it has been used
	events *subscription // from before the stream was offered
	// mayHaveRun: an earlier agent has told the CPUs to run.
	mayHaveRun bool
	ran        bool // they run, as far as we are concerned
}

var _ migrate.Shell = (*Shell)(nil)

// incomingChannel is the name under which QEMU is given its end of the socket.
const incomingChannel = "lmctl-incoming"

// buildShell makes the guest's folder and starts its QEMU. On an error nothing
// of either is left.
func (v *vm) buildShell(ctx context.Context, b *bundle, done func()) (_ *Shell, err error) {
	if err := v.store(); err != nil {
		v.d.remove(v) // what is in the guest's place is not ours
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.discard())
		}
	}()
	inst, err := v.launch(ctx, v.rec.Run, true)
	if err != nil {
		return nil, err
	}
	mon := v.monitor(inst)
	cpu, err := queryCPU(ctx, mon)
	if err != nil {
		return nil, err
	}
	if reasons := b.Guest.lacking(cpu); len(reasons) > 0 {
		return nil, &migrate.Refusal{Reasons: reasons}
	}
	before, err := currentSettings(ctx, mon, shellSettings)
	if err != nil {
		return nil, err
	}
	if err := writeJSON(v.files.suspension(), before, false); err != nil {
		return nil, err
	}
	if err := shellSettings.apply(ctx, mon); err != nil {
		return nil, err
	}
	s, err := v.newShell(inst, done)
	if err != nil {
		return nil, err
	}
	if err := s.listen(ctx, mon); err != nil {
		return nil, errors.Join(err, s.giveUp())
	}
	return s, nil
}

// discard removes a guest that never ran here, with its process.
func (v *vm) discard() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*quitTimeout)
	defer cancel()
	err := v.end(ctx, hypervisor.End{Cause: hypervisor.EndDestroyed})
	if err == nil {
		err = v.erase()
	}
	v.d.remove(v)
	return err
}

func (v *vm) newShell(inst *instance, done func()) (*Shell, error) {
	file, err := os.OpenFile(v.files.memory, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	s := &Shell{v: v, inst: inst, lost: make(chan struct{}), done: done, file: file}
	v.d.wg.Go(func() {
		select {
		case <-inst.proc.done:
			close(s.lost)
		case <-v.d.ctx.Done():
		}
	})
	return s, nil
}

// listen has QEMU wait for the state on a socket of ours. An agent that dies
// closes it, and QEMU ends by itself.
func (s *Shell) listen(ctx context.Context, mon *monitor) error {
	ours, theirs, err := socketPair(incomingChannel)
	if err != nil {
		return err
	}
	err = mon.runWithFile(ctx, "getfd", object{"fdname": incomingChannel}, nil, theirs)
	if err = errors.Join(err, theirs.Close()); err != nil {
		return errors.Join(err, ours.Close())
	}
	s.events = mon.subscribe()
	s.stream = ours
	return mon.run(ctx, "migrate-incoming", object{"uri": "fd:" + incomingChannel}, nil)
}

// ShellOf finds the shell of an earlier agent again. When ran is true its CPUs
// may have been told to run already: Resume sees to it that they do, and
// Destroy refuses.
func (d *Driver) ShellOf(name string) (_ *Shell, ran bool, err error) {
	v, err := d.lookup(name)
	if err != nil {
		return nil, false, err
	}
	done, err := v.begin("incoming migration", hypervisor.StateIncoming, hypervisor.StateRunning, hypervisor.StatePaused)
	if err != nil {
		return nil, false, err
	}
	v.mu.Lock()
	inst := v.inst
	ran = v.state != hypervisor.StateIncoming || hasRun(v.runstate)
	v.mu.Unlock()
	// The mark is there before the CPUs are told to run, so that one that
	// cannot be looked for counts.
	if _, err := os.Stat(v.files.resumed()); !errors.Is(err, fs.ErrNotExist) {
		ran = true
	}
	if inst == nil {
		done()
		return nil, false, &hypervisor.StateError{Guest: name, Operation: "take over", State: hypervisor.StateStopped}
	}
	s, err := v.newShell(inst, done)
	if err != nil {
		done()
		return nil, false, fmt.Errorf("take over guest %s: %w", name, err)
	}
	s.mayHaveRun = ran
	return s, ran, nil
}

// Close gives the guest back without running or destroying it. One that runs
// gives itself back.
func (s *Shell) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ran {
		return nil
	}
	err := s.letGo()
	s.done()
	return err
}

// giveUp closes what the shell holds. It may be called again.
func (s *Shell) giveUp() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.letGo()
}

// letGo is giveUp with s.mu held.
func (s *Shell) letGo() error {
	var errs []error
	if s.file != nil {
		errs = append(errs, s.file.Close())
		s.file = nil
	}
	if s.stream != nil {
		errs = append(errs, s.stream.Close())
		s.stream = nil
	}
	if s.events != nil {
		s.events.close()
		s.events = nil
	}
	return errors.Join(errs...)
}

// Memory is the guest's RAM, valid until the shell runs, is destroyed or is
// closed.
func (s *Shell) Memory() []migrate.Memory {
	s.mu.Lock()
	defer s.mu.Unlock()
	return []migrate.Memory{{Name: memoryBackend, File: s.file, Size: int64(s.v.def.Memory)}}
}

// Answer is nothing: a QEMU that waits has nothing to say.
func (s *Shell) Answer() []byte { return nil }

// Lost is closed when QEMU has ended.
func (s *Shell) Lost() <-chan struct{} { return s.lost }

// LoadState feeds r to QEMU and waits until it has loaded all of it. There are no
// answers: the source opens no return path.
func (s *Shell) LoadState(ctx context.Context, r io.Reader, _ io.Writer) error {
	if err := s.loadState(ctx, r); err != nil {
		return fmt.Errorf("load the device state of guest %s: %w", s.v.def.Name, err)
	}
	return nil
}

func (s *Shell) loadState(ctx context.Context, r io.Reader) (err error) {
	s.mu.Lock()
	conn, sub := s.stream, s.events
	s.stream, s.events = nil, nil
	s.mu.Unlock()
	if conn == nil {
		return errors.New("this shell has taken a state already, or its stream is lost")
	}
	defer sub.close()
	cancelled := context.AfterFunc(ctx, func() { _ = conn.Close() })
	_, err = io.Copy(conn, r)
	if err == nil {
		err = conn.CloseWrite()
	}
	if err == nil {
		err = awaitCompleted(ctx, s.v.monitor(s.inst), sub)
	}
	if !cancelled() {
		return ctx.Err()
	}
	if closeErr := conn.Close(); err == nil && closeErr != nil {
		return closeErr
	}
	if err == nil {
		return nil
	}
	return s.explain(ctx, err)
}

// explain adds QEMU's words to a failed load. A QEMU that cannot load a state
// says so on its standard error and exits.
func (s *Shell) explain(ctx context.Context, cause error) error {
	ctx, cancel := context.WithTimeout(ctx, quitTimeout)
	defer cancel()
	select {
	case <-s.inst.ended:
		cause = fmt.Errorf("%w; QEMU %s", cause, s.inst.proc.exit)
	case <-ctx.Done():
	}
	s.v.mu.Lock()
	offset := s.inst.offset
	s.v.mu.Unlock()
	if words := logTail(s.v.files.log(), offset); words != "" {
		cause = fmt.Errorf("%w: %s", cause, words)
	}
	return cause
}

// Announce tells the network where the guest is now.
func (s *Shell) Announce(ctx context.Context) (int, error) {
	return s.v.announce(ctx)
}

// errRan says that a shell is none any more.
var errRan = errors.New("its CPUs were started; it is a guest of this host")

// Destroy ends a shell that never ran and removes all of it. Also when it fails
// the shell holds the guest no more.
func (s *Shell) Destroy(ctx context.Context) error {
	s.mu.Lock()
	ran := s.ran || s.mayHaveRun
	s.mu.Unlock()
	if ran {
		return fmt.Errorf("destroy the shell of guest %s: %w", s.v.def.Name, errRan)
	}
	if err := s.destroy(ctx); err != nil {
		return fmt.Errorf("destroy the shell of guest %s: %w", s.v.def.Name, err)
	}
	return nil
}

func (s *Shell) destroy(ctx context.Context) error {
	defer s.done()
	err := s.giveUp()
	if err := s.v.end(ctx, hypervisor.End{Cause: hypervisor.EndDestroyed}); err != nil {
		return err
	}
	if err := s.v.erase(); err != nil {
		return err
	}
	s.v.d.remove(s.v)
	return err
}
