package qemu

import (
	"context"
	"fmt"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// StartIncoming runs the QEMU of a stopped guest with its network connected and
// its CPUs waiting for QEMU's own migrate-incoming, which the caller gives it
// through its observer socket. This is the destination of QEMU's own migration,
// with the very command line that Start gives it: what ours is measured against.
func (d *Driver) StartIncoming(ctx context.Context, name string) error {
	v, err := d.lookup(name)
	if err != nil {
		return err
	}
	done, err := v.begin("start", hypervisor.StateStopped)
	if err != nil {
		return err
	}
	defer done()
	if err := v.startIncoming(ctx); err != nil {
		return fmt.Errorf("start guest %s for an incoming migration: %w", name, err)
	}
	return nil
}

func (v *vm) startIncoming(ctx context.Context) error {
	run, err := v.d.resolve(ctx, v.def)
	if err != nil {
		return err
	}
	if err := v.updateRecord(func(r *record) { *r = record{Run: run} }); err != nil {
		return err
	}
	inst, err := v.launch(ctx, run, true)
	if err != nil {
		v.recordFailure(err)
		return err
	}
	for i := range v.def.NICs {
		if err := v.d.raiseTap(tapName(v.def.UUID, i)); err != nil {
			return v.abandon(inst, err)
		}
	}
	return nil
}
