package qemu

import (
	"context"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// Watch sends what becomes of the guests of this host.
func (d *Driver) Watch(ctx context.Context) <-chan hypervisor.Info {
	return d.watchers.Watch(ctx, d.List)
}

// tell sends a guest's snapshot to the watchers.
func (d *Driver) tell(i hypervisor.Info) { d.watchers.Tell(i) }
