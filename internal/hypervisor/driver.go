// Package hypervisor has what all hypervisors of an agent have in common: the
// words for what becomes of a guest, and the interface of a driver. The drivers
// are the packages beneath it.
package hypervisor

import (
	"context"
	"time"

	"github.com/lmctl/lmctl/migrate"
)

// Driver runs the guests of one host. Its methods may be called concurrently.
// The guests do not depend on it: Close lets them go on, and Adopt finds them
// again.
type Driver interface {
	migrate.Host
	// Adopt finds the guests of this host and what an earlier agent left of
	// its migrations. It is called once, before anything else.
	Adopt(ctx context.Context) error
	Close() error
	// Examine compares this host with what an offered guest needs, as Prepare
	// does, and leaves nothing. The offer needs no Blocks. An error says that it
	// could not be found out.
	Examine(ctx context.Context, offer migrate.Offer) (Checks, error)
	// Define makes a guest of a definition in the driver's own language.
	Define(text []byte) (Info, error)
	// Definition is the text from which Define would make the guest again.
	Definition(name string) ([]byte, error)
	// Identify says whose definition a text is.
	Identify(text []byte) (name, uuid string, err error)
	// Undefine forgets a stopped guest. Its disks stay.
	Undefine(name string) error
	Start(ctx context.Context, name string) error
	// Stop asks the guest to power down and waits until it has, for ErrStillRunning
	// no longer than timeout.
	Stop(ctx context.Context, name string, timeout time.Duration) error
	// Destroy ends the guest at once.
	Destroy(ctx context.Context, name string) error
	// List describes all guests of this host, by name.
	List() []Info
	// Get describes one; the error has ErrNotFound in its chain if there is none.
	Get(name string) (Info, error)
	// Watch sends what becomes of the guests of this host: an Info for each
	// change of state, in order and without gaps, and one with the state removed
	// for a guest that is no longer here. It begins with every guest as it is.
	// The channel is closed when ctx ends or the driver is closed.
	Watch(ctx context.Context) <-chan Info
	// Source takes a guest for a migration away from this host: one that runs, or
	// one whose earlier migration was interrupted and that Info calls suspended,
	// so that it can be resumed or released.
	Source(name string) (Source, error)
	// ShellOf finds the shell of an earlier agent again. When ran is true its CPUs
	// may have been told to run already: Resume sees to it that they do, and
	// Destroy refuses.
	ShellOf(name string) (shell Shell, ran bool, err error)
}

// Source is a guest held for one migration, until Close gives it back.
type Source interface {
	migrate.Guest
	// Examine says what speaks for and against the guest's leaving, as Movable
	// does. An error says that it could not be found out.
	Examine(ctx context.Context) (*Examination, error)
	Close() error
}

// Shell is the shell of an earlier agent, held until Close gives it back.
type Shell interface {
	migrate.Shell
	Close() error
}
