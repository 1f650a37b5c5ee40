package migrate

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"time"

	"github.com/lmctl/lmctl/dirtymap"
)

// PageSize is the unit of tracking and copying, in bytes.
const PageSize = 4096

// Memory is one block of guest RAM: a file that the hypervisor's process maps
// shared and that the agent has open too. The engine never closes File.
type Memory struct {
	// Name is the hypervisor's name for the block, the same at both ends.
	Name string
	// File is the memory file, open for reading and writing.
	File *os.File
	// Size in bytes, a multiple of PageSize.
	Size int64
	// Addr is where the hypervisor's process maps the block, in bytes from
	// zero in its address space. Zero at the destination, where nothing is
	// tracked.
	Addr uint64
}

// Process names the hypervisor's process. Its pidfd is owned by the guest and
// valid as long as the guest is.
type Process = dirtymap.Process

// Guest is a running guest at the source, as the engine needs it. No method is
// called before the one before has returned.
type Guest interface {
	// Name and UUID identify the guest on every host.
	Name() string
	UUID() string
	// Definition is what the destination's Host needs to build the shell VM.
	// The engine carries it and does not look inside.
	Definition(ctx context.Context) ([]byte, error)
	// Prepared is told what the destination's Shell answers to the Definition,
	// before the first pass.
	Prepared(answer []byte) error
	// Process is the hypervisor's process, whose page tables are tracked.
	Process() Process
	// Memory lists the blocks of guest RAM.
	Memory(ctx context.Context) ([]Memory, error)
	// Movable says what forbids a direct migration of this guest, as a
	// *Refusal that names each device, or nil.
	Movable(ctx context.Context) error
	// Discards says whether guest pages can turn back into holes while the
	// guest runs (a balloon, free page reporting). Such a change is no write
	// and is not in the bitmap, so that the engine then compares the holes. It
	// is asked once, before the first pass.
	Discards(ctx context.Context) (bool, error)
	// Drain waits until every block I/O that was in flight when it was called
	// has landed in guest memory, without stopping the guest.
	Drain(ctx context.Context) error
	// Suspend makes the hypervisor write device state to w: first, while the
	// guest still runs, what does not depend on its being stopped; then it
	// stops the guest. It returns when no vCPU runs and no block I/O is in
	// flight, with the time of the stop. Writing to w goes on in the
	// background only until SaveState or Resume returns. After Relay, w is nil:
	// the hypervisor is told to stop the guest now, whatever is left.
	Suspend(ctx context.Context, w io.Writer) (stopped time.Time, err error)
	// SaveState has the rest of the device state written to the w of Suspend
	// and returns when all of it has been. After Relay it returns when the other
	// side has loaded the guest.
	SaveState(ctx context.Context) error
	// Resume undoes Suspend, from whatever point that reached, also if it
	// failed or SaveState did: the guest runs as if nothing had happened, with
	// its network and without any capability or parameter left behind. It does
	// nothing to a guest that was not suspended.
	Resume(ctx context.Context) error
	// Forward sends what has queued up here for the stopped guest's network
	// after it, and what still comes here until its new place is known
	// everywhere. It is called while the guest runs at the destination, and
	// returns the number of frames sent on.
	Forward(ctx context.Context) (frames int, err error)
	// Release ends the suspended copy of a guest that now runs elsewhere, and
	// removes all that belonged to it on this host. The guest's disks stay.
	Release(ctx context.Context) error
}

// RelayGuest is a Guest whose hypervisor can copy the memory by itself. In a
// relayed migration Relay takes the place of Memory, Discards and Drain; then
// come Suspend, with a nil writer, and SaveState.
type RelayGuest interface {
	Guest
	// Relayable says what forbids a relayed migration of this guest, as a
	// *Refusal, or nil.
	Relayable(ctx context.Context) error
	// Relay has the hypervisor write all of the running guest to conn, and read
	// from it what its other side answers, in the background until SaveState or
	// Resume returns. It may stop the guest by itself once what is left fits
	// target. An error, too, is undone by Resume. The guest has ram bytes of
	// memory.
	Relay(ctx context.Context, conn io.ReadWriter, target time.Duration) (ram int64, err error)
	// AwaitPass returns when the hypervisor has finished a pass, or has stopped
	// the guest.
	AwaitPass(ctx context.Context) (RelayPass, error)
}

// RelayPass is the hypervisor's account of one of its passes.
type RelayPass struct {
	Pass
	// Stopped says that the hypervisor has stopped the guest, in this pass, of
	// which this is the live part. There is none after it.
	Stopped bool
}

// Offer is what a destination learns about a guest before it takes it.
type Offer struct {
	Migration  string // the migration's id, a UUID
	Source     string // the host that owns the guest, as its certificate says
	Guest      string
	UUID       string
	Epoch      uint64 // the epoch that the guest will have at the destination
	Definition []byte
	Mode       Mode
	Blocks     []BlockInfo // none in relay mode
}

// BlockInfo describes a block of guest RAM across hosts.
type BlockInfo struct {
	Name string `json:"name"`
	Size int64  `json:"size"` // bytes
}

// Host prepares shell VMs at the destination.
type Host interface {
	// Prepare checks that this host can take the guest and creates the shell
	// VM: same configuration, memory mapped and empty, vCPUs never started.
	// A host that cannot returns a *Refusal naming each thing that is missing.
	// On error nothing of the shell is left.
	Prepare(ctx context.Context, offer Offer) (Shell, error)
}

// Shell is a guest in the making at the destination.
type Shell interface {
	// Memory lists the shell's blocks, by the same names and sizes as the
	// source's. The engine makes holes of all of it before anything comes.
	Memory() []Memory
	// Answer is what the source's hypervisor is to know of the shell, for
	// Guest.Prepared; nil for nothing.
	Answer() []byte
	// LoadState feeds the device state to the hypervisor, or in a relayed
	// migration the whole guest. It reads r to its end and returns when the
	// hypervisor has loaded all of it; the vCPUs stay stopped. What the
	// hypervisor says to its other side goes to answers, unless that is nil.
	// After an error r may be read until it fails.
	LoadState(ctx context.Context, r io.Reader, answers io.Writer) error
	// Resume connects the guest's network and starts its vCPUs. From here on
	// the shell is a guest like any other of this host. An error that has
	// ErrNotStarted in its chain means that no vCPU ran, for certain; after any
	// other it may have.
	Resume(ctx context.Context) error
	// Announce tells the network where the guest's addresses are now, several
	// times over half a second, and returns the number of addresses announced.
	Announce(ctx context.Context) (int, error)
	// Destroy ends a shell whose vCPUs never ran and removes all of it.
	Destroy(ctx context.Context) error
	// Lost is closed when the hypervisor's process has ended by itself.
	Lost() <-chan struct{}
}

// ErrNotStarted is in the chain of a Shell's Resume error when no vCPU ran.
var ErrNotStarted = errors.New("no vCPU was started")

// Refusal says why a migration was refused before anything was copied.
type Refusal struct {
	Reasons []string // each a sentence that names what is missing and what to do
}

func (r *Refusal) Error() string { return strings.Join(r.Reasons, "; ") }
