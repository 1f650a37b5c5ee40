package libvirt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	lv "github.com/digitalocean/go-libvirt"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/migrate"
)

// Shell is a domain on its way to this host. It holds the domain for one
// operation until it runs, is destroyed or is closed.
type Shell struct {
	g          *domain
	done       func()
	record     shellRecord
	definition string // the XML by which libvirt makes it

	// The following are of a shell of our own, not of an earlier agent's.
	l         *link // the connection on which it was prepared: it ends with that
	socket    string
	prepared  bool   // libvirt may have something of it
	activates bool   // libvirt has it take its disks when its state is there
	cookie    []byte // of Prepare3, for the source's Perform3
	memory    []migrate.Memory
	proc      *process

	mu sync.Mutex
	// finished says that libvirt's migration is over: the domain is an ordinary
	// one that stands still, and survives us.
	finished bool
	ran      bool // it was told to run, perhaps by an earlier agent
	resumed  bool // it runs, as far as we are concerned
	closed   bool
}

var _ hypervisor.Shell = (*Shell)(nil)

// ShellOf finds the shell of an earlier agent again.
func (d *Driver) ShellOf(name string) (_ hypervisor.Shell, ran bool, err error) {
	g, err := d.lookup(name)
	if err != nil {
		return nil, false, err
	}
	done, err := g.begin("incoming migration", hypervisor.StateIncoming, hypervisor.StateRunning, hypervisor.StatePaused)
	if err != nil {
		return nil, false, err
	}
	s := &Shell{g: g, done: done, finished: true}
	if err := read(g.files.shell(), &s.record); err != nil && !errors.Is(err, os.ErrNotExist) {
		done()
		return nil, false, fmt.Errorf("take over guest %s: %w", name, err)
	}
	// The mark is there before the domain is told to run, so that one that
	// cannot be looked for counts. One that runs without it was told to by another
	// hand, and is no guest of this host's, unless it has arrived.
	shell, told := there(g.files.shell()), there(g.files.resumed())
	if !shell && !told && !g.runs() {
		done()
		return nil, false, &hypervisor.StateError{Guest: name, Operation: "take over the shell of", State: g.info().State}
	}
	g.mu.Lock()
	s.proc, s.ran, g.shell = g.proc, told || !shell, s
	g.mu.Unlock()
	return s, s.ran, nil
}

// runs says whether libvirt says so.
func (g *domain) runs() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.state == hypervisor.StateRunning
}

// Memory is the guest's RAM, valid until the shell runs, is destroyed or is
// closed.
func (s *Shell) Memory() []migrate.Memory { return s.memory }

// Answer is libvirt's cookie.
func (s *Shell) Answer() []byte { return s.cookie }

// Lost is closed when QEMU has ended.
func (s *Shell) Lost() <-chan struct{} {
	if s.proc == nil {
		ended := make(chan struct{})
		close(ended)
		return ended
	}
	return s.proc.ended
}

// LoadState feeds r to QEMU and waits until it has loaded all of it and libvirt
// has taken the domain for its own, paused.
func (s *Shell) LoadState(ctx context.Context, r io.Reader, answers io.Writer) error {
	if err := s.loadState(ctx, r, answers); err != nil {
		return fmt.Errorf("load the device state of guest %s: %w", s.g.name, err)
	}
	return nil
}

func (s *Shell) loadState(ctx context.Context, r io.Reader, answers io.Writer) (err error) {
	conn, err := dial(ctx, s.socket, s.proc)
	if err != nil {
		return err
	}
	answered := answerTo(answers, conn)
	defer func() {
		if closeErr := conn.Close(); err == nil && !errors.Is(closeErr, net.ErrClosed) {
			err = closeErr
		}
		answered.Wait()
	}()
	cancelled := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer cancelled()
	// Finish3 waits for the state, so that its answer is there as soon as the
	// state is.
	finished, copied := make(chan error, 1), make(chan error, 1)
	go func() { finished <- s.take(ctx) }()
	go func() { copied <- feed(conn, r) }()
	// A QEMU that has failed is not fed to the end: the source's waits for what
	// this one will never answer, and so does not come to its end.
	if err := <-finished; err != nil {
		select {
		case why := <-copied:
			err = errors.Join(err, why)
		default:
		}
		return err
	}
	s.mu.Lock()
	s.finished = true
	s.mu.Unlock()
	why := <-copied
	if err := ctx.Err(); err != nil {
		return err
	}
	if why != nil {
		// QEMU has all it wants, and has closed its end before ours.
		_, why = io.Copy(io.Discard, r)
	}
	return why
}

// feed gives QEMU what r says, to its end. If it cannot, it hangs up: then QEMU
// ends, and libvirt says why.
func feed(conn *net.UnixConn, r io.Reader) error {
	_, err := io.Copy(conn, r)
	if err == nil {
		err = conn.CloseWrite()
	}
	if err != nil {
		err = errors.Join(err, conn.Close())
	}
	return err
}

// answerTo passes on what QEMU says to its other side, until it says no more or
// conn is closed. Why it says no more, its load tells.
func answerTo(answers io.Writer, conn net.Conn) *sync.WaitGroup {
	var passing sync.WaitGroup
	if answers != nil {
		passing.Go(func() { _, _ = io.Copy(answers, conn) })
	}
	return &passing
}

// take has libvirt take the domain for its own when its state is there: paused,
// and without its disks. That does not wait for the end of our stream: the source
// may have broken off just before it, and want to go on.
func (s *Shell) take(ctx context.Context) error {
	err := do(ctx, s.l, func(l *link) error { return s.finish(l, false) })
	if err != nil || !s.activates {
		return err
	}
	return s.g.leaveDisks(ctx, s.l)
}

// finish ends libvirt's migration here: with the domain paused, or gone.
func (s *Shell) finish(l *link, cancel bool) error {
	flags, retcode := migrateFlags|lv.MigratePaused, int32(0)
	if cancel {
		retcode = 1
	}
	parameters := []lv.TypedParam{text("destination_name", s.g.name), text("migrate_uri", "unix://"+s.socket)}
	_, _, err := l.DomainMigrateFinish3Params(parameters, nil, uint32(flags), retcode)
	return err
}

// Resume connects the guest's network and starts its CPUs.
func (s *Shell) Resume(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.resumed {
		return nil
	}
	if err := s.run(ctx); err != nil {
		if s.ran {
			s.g.expectArrival(s.record)
		}
		err = errors.Join(err, s.letGo())
		return fmt.Errorf("run guest %s: %w", s.g.name, err)
	}
	s.ran, s.resumed = true, true
	s.g.setArriving(&s.record)
	s.g.d.wg.Go(func() {
		s.g.settleIn(s.record)
		s.mu.Lock()
		defer s.mu.Unlock()
		if err := s.letGo(); err != nil {
			s.g.d.log.Warn("close what the shell held", "guest", s.g.name, "error", err)
		}
	})
	return nil
}

func (s *Shell) run(ctx context.Context) error {
	notStarted := func(err error) error {
		if s.ran {
			return err // by an earlier agent, perhaps
		}
		return fmt.Errorf("%w: %w", migrate.ErrNotStarted, err)
	}
	l, err := s.g.d.conn.get()
	if err != nil {
		return notStarted(err)
	}
	if s.ran && s.g.runs() {
		return nil
	}
	if s.proc != nil && s.proc.dead() { // else libvirt's error may not say so
		return notStarted(errors.New("its QEMU has ended"))
	}
	// The mark is for the next agent, should this one die now.
	if err := write(s.g.files.resumed(), true); err != nil {
		return notStarted(err)
	}
	err = do(ctx, l, func(l *link) error { return l.DomainResume(s.g.ref()) })
	if err == nil {
		return nil
	}
	if ctx.Err() != nil || errors.Is(err, errDisconnected) {
		s.ran = true // libvirt did not answer, and may be about to
		return err
	}
	if isCode(err, lv.ErrNoDomain) {
		// It ended before libvirt was asked. Other errors may come from one that
		// ended when its CPUs had begun.
		return notStarted(err)
	}
	state, _, stateErr := s.g.stateAt(ctx, l)
	switch {
	case stateErr != nil:
		s.ran = true // it may
		return errors.Join(err, stateErr)
	case state == hypervisor.StateRunning:
		return nil
	case s.ran:
		return err
	}
	return errors.Join(notStarted(err), removeFile(s.g.files.resumed()))
}

// Announce tells the network where the guest is now.
func (s *Shell) Announce(ctx context.Context) (int, error) {
	cards, err := s.g.cardsHere(ctx)
	if err != nil {
		return 0, fmt.Errorf("announce guest %s: %w", s.g.name, err)
	}
	if len(cards) == 0 {
		return 0, nil
	}
	n, err := s.g.d.cfg.Announce(ctx, cards)
	if err != nil {
		return n, fmt.Errorf("announce guest %s: %w", s.g.name, err)
	}
	return n, nil
}

// errRan says that a shell is none any more.
var errRan = errors.New("its CPUs were started; it is a guest of this host")

// errAnother says that a shell has ended, and its domain runs all the same.
var errAnother = errors.New("another hand has brought it here meanwhile")

// lost says whether the shell's QEMU has ended.
func (s *Shell) lost() bool {
	select {
	case <-s.Lost():
		return true
	default:
		return false
	}
}

// replaced says whether the domain has another QEMU than the shell's.
func (s *Shell) replaced() (bool, error) {
	if s.proc == nil || !s.lost() {
		return false, nil
	}
	p, err := s.g.d.findProcess(s.g.name, s.g.uuid)
	if errors.Is(err, errNoProcess) {
		return false, nil // libvirt has yet to notice
	}
	if err != nil {
		return false, err
	}
	return p.pid != s.proc.pid || p.start != s.proc.start, p.close()
}

// destroyTimeout bounds the end of a shell.
const destroyTimeout = time.Minute

// Destroy ends a shell that never ran and removes all of it. Also when it fails
// the shell holds the guest no more.
func (s *Shell) Destroy(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ran {
		return fmt.Errorf("destroy the shell of guest %s: %w", s.g.name, errRan)
	}
	ctx, cancel := context.WithTimeout(ctx, destroyTimeout)
	defer cancel()
	err := s.destroy(ctx)
	if err = errors.Join(err, s.letGo()); err != nil {
		return fmt.Errorf("destroy the shell of guest %s: %w", s.g.name, err)
	}
	return nil
}

func (s *Shell) destroy(ctx context.Context) error {
	s.g.intend(hypervisor.EndDestroyed)
	if s.prepared && !s.finished {
		err := do(ctx, s.l, func(l *link) error { return s.finish(l, true) })
		if err != nil {
			// Libvirt may know nothing of it, which is what is wanted; what
			// there is, is looked for below.
			s.g.d.log.Debug("cancel libvirt's migration", "guest", s.g.name, "error", err)
		}
	}
	if !s.prepared && !s.finished {
		return s.g.vanished()
	}
	l, err := s.g.d.conn.await(ctx)
	if err != nil {
		return err
	}
	for {
		state, _, err := s.g.stateAt(ctx, l)
		if isCode(err, lv.ErrNoDomain) {
			return s.g.vanished()
		}
		if err != nil {
			return err
		}
		if state == hypervisor.StateStopped { // and defined, by another hand
			return s.g.noShell()
		}
		another, err := s.replaced()
		if err != nil {
			return err
		}
		if another {
			return errors.Join(errAnother, s.g.noShell())
		}
		if state == hypervisor.StateRunning {
			// We never told it to: the guest is the copy at the source.
			s.g.d.log.Warn("ending a copy that another hand had run before it was this host's", "guest", s.g.name)
		}
		err = do(ctx, l, func(l *link) error { return l.DomainDestroy(s.g.ref()) })
		if err == nil || isCode(err, lv.ErrNoDomain) {
			continue
		}
		if waitErr := pause(ctx); waitErr != nil {
			return errors.Join(err, waitErr)
		}
	}
}

// noShell notes that a domain is none that comes here by us.
func (g *domain) noShell() error {
	g.tell(func() { g.incoming = false })
	return g.files.remove()
}

// Close gives the guest back without running or destroying it. One that runs
// gives itself back.
func (s *Shell) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.resumed {
		return nil
	}
	return s.letGo()
}

// letGo closes what the shell holds. The mu is held.
func (s *Shell) letGo() error {
	if s.closed {
		return nil
	}
	s.closed = true
	s.g.mu.Lock()
	if s.g.shell == s {
		s.g.shell = nil
	}
	s.g.mu.Unlock()
	err := closeBlocks(s.memory)
	s.memory = nil
	s.done()
	if s.lost() {
		s.g.lookAgain() // nobody forgot it as long as it was ours
	}
	return err
}
