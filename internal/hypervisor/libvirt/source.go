package libvirt

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	lv "github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/nics"
	"github.com/lmctl/lmctl/migrate"
)

// migrateFlags are those of every call of a migration. Unsafe, since whether the
// disks are safe to move with is our own check (see preflight): libvirt's does
// not know of files that both hosts see by other means than a cluster file
// system.
const migrateFlags = lv.MigrateLive | lv.MigrateUnsafe

// Guest is a domain of this host as the source of a migration. It holds the
// domain for one operation until Close.
type Guest struct {
	g     *domain
	proc  *process
	pidfd int
	done  func()
	once  sync.Once

	blocks []migrate.Memory

	// From Definition on.
	xml    string // by which the destination makes it
	cookie []byte // of the destination's libvirt, from Prepared on
	like   string // its XML at that time, with what may change left out

	// From Suspend to Resume or Release.
	suspension *suspension
	caught     *nics.Caught
	relaying   bool           // Relay was called
	answering  sync.WaitGroup // answers are being written to QEMU
}

var _ hypervisor.Source = (*Guest)(nil)

// Source takes a domain for a migration away from this host.
func (d *Driver) Source(name string) (hypervisor.Source, error) {
	g, err := d.lookup(name)
	if err != nil {
		return nil, err
	}
	done, err := g.begin("migration", hypervisor.StateRunning, hypervisor.StatePaused, hypervisor.StateMigrating)
	if err != nil {
		return nil, err
	}
	s, err := g.source(done)
	if err != nil {
		done()
		return nil, fmt.Errorf("migrate guest %s: %w", name, err)
	}
	return s, nil
}

func (g *domain) source(done func()) (*Guest, error) {
	g.mu.Lock()
	proc := g.proc
	g.mu.Unlock()
	if proc == nil {
		return nil, errNoProcess
	}
	pidfd, err := proc.duplicate()
	if err != nil {
		return nil, err
	}
	return &Guest{g: g, proc: proc, pidfd: pidfd, done: done}, nil
}

// Close gives the domain back. It neither resumes nor releases it. What Relay was
// given has come to its end.
func (s *Guest) Close() error {
	var err error
	s.once.Do(func() {
		if s.suspension != nil {
			err = s.suspension.stream.close()
		}
		s.answering.Wait()
		err = errors.Join(err, s.caught.Close(), closeBlocks(s.blocks), unix.Close(s.pidfd))
		s.done()
	})
	return err
}

// Name identifies the guest.
func (s *Guest) Name() string { return s.g.name }

// UUID identifies the guest.
func (s *Guest) UUID() string { return s.g.uuid }

// Prepared is told libvirt's cookie of Prepare3.
func (s *Guest) Prepared(answer []byte) error {
	s.cookie = answer
	return nil
}

// Process is QEMU. The descriptor is valid until Close.
func (s *Guest) Process() migrate.Process {
	return migrate.Process{PID: s.proc.pid, PIDFD: s.pidfd}
}

// Memory opens the domain's RAM, one block for each memory backend.
func (s *Guest) Memory(context.Context) ([]migrate.Memory, error) {
	if s.blocks == nil {
		blocks, err := s.proc.blocks()
		if err != nil {
			return nil, fmt.Errorf("memory of guest %s: %w", s.g.name, err)
		}
		s.blocks = blocks
	}
	return s.blocks, nil
}

// Discards says whether the guest can give pages back.
func (s *Guest) Discards(context.Context) (bool, error) {
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	x := s.g.facts.xml
	if x == nil || x.Devices == nil || x.Devices.MemBalloon == nil {
		return false, nil
	}
	return x.Devices.MemBalloon.Model != "none", nil
}

// Drain waits until the block I/O that is in flight has landed.
func (s *Guest) Drain(ctx context.Context) error {
	l, err := s.g.d.conn.get()
	if err == nil {
		err = s.g.drain(ctx, l)
	}
	if err != nil {
		return fmt.Errorf("drain the block I/O of guest %s: %w", s.g.name, err)
	}
	return nil
}

// Forward sends the frames on that came here for the stopped guest.
func (s *Guest) Forward(ctx context.Context) (int, error) {
	frames, err := s.caught.Forward(ctx, s.proc.pid, s.pidfd)
	if err != nil {
		return frames, fmt.Errorf("forward what came for guest %s: %w", s.g.name, err)
	}
	return frames, nil
}

// releaseTimeout bounds the end of a copy of which another host runs the guest.
const releaseTimeout = time.Minute
