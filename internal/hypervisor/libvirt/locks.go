package libvirt

import (
	"context"
	"errors"

	lv "github.com/digitalocean/go-libvirt"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// A domain that has come here and stands still must not have its disks yet: the
// source could not go on, should it turn out that it is to. QEMU takes them when
// its CPUs start. But libvirt 11 with QEMU 10 has it take them at Finish3 already
// if the domain is to stay paused, for the sake of block jobs, and with them the
// locks.

// activatesSince is the version of QEMU that can be told to take and to leave its
// disks, as libvirt counts.
const activatesSince = 10 * 1000 * 1000

// activates says whether libvirt has domains that come here take their disks.
func activates(ctx context.Context, l *link) (bool, error) {
	version, err := call(ctx, l, func(l *link) (uint64, error) { return l.ConnectGetVersion() })
	return version >= activatesSince, err
}

// leaveDisks has a domain leave its disks until its CPUs start. They must stand
// still, and nobody be about to start them.
func (g *domain) leaveDisks(ctx context.Context, l *link) error {
	err := g.monitor(ctx, l, "blockdev-set-active", object{"active": false}, nil)
	if errors.Is(err, errNoCommand) {
		return nil // a QEMU of its own, and older
	}
	return err
}

// leaveDisksAgain is for a shell that an earlier agent left, perhaps just before
// it did so itself.
func (g *domain) leaveDisksAgain(ctx context.Context, l *link) error {
	done, err := g.begin("incoming migration", hypervisor.StateIncoming)
	if err != nil {
		return nil // it is no shell, or in somebody's hands, who sees to it
	}
	defer done()
	state, word, err := g.stateAt(ctx, l)
	if isCode(err, lv.ErrNoDomain) {
		return nil
	}
	if err != nil || state != hypervisor.StatePaused || word == pausedToMigrate || there(g.files.resumed()) {
		return err
	}
	if is, err := activates(ctx, l); err != nil || !is {
		return err
	}
	return g.leaveDisks(ctx, l)
}
