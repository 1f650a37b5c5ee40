package qemu

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// Stop asks a running guest to power down, as its power button would, and
// waits until it has ended. A guest that does not within timeout runs on and
// the error is ErrStillRunning.
func (d *Driver) Stop(ctx context.Context, name string, timeout time.Duration) error {
	v, err := d.lookup(name)
	if err != nil {
		return err
	}
	done, err := v.begin("stop", hypervisor.StateRunning)
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, hypervisor.ErrStillRunning)
	defer cancel()
	if err := v.powerDown(ctx); err != nil {
		return fmt.Errorf("stop guest %s: %w", name, err)
	}
	return nil
}

func (v *vm) powerDown(ctx context.Context) error {
	inst := v.intend(hypervisor.EndStopped)
	if inst == nil {
		return nil // it ended by itself
	}
	if err := v.monitor(inst).run(ctx, "system_powerdown", nil, nil); err != nil {
		v.intend("")
		if cause := context.Cause(ctx); errors.Is(cause, hypervisor.ErrStillRunning) {
			return fmt.Errorf("%w (%w)", cause, err)
		}
		return err
	}
	select {
	case <-inst.ended:
		return nil
	case <-ctx.Done():
		v.intend("")
		return context.Cause(ctx)
	case <-v.d.ctx.Done():
		return errors.New("the driver was closed")
	}
}

// intend notes what an operator wants of the guest's process.
func (v *vm) intend(cause hypervisor.EndCause) *instance {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.inst != nil {
		v.inst.intent = cause
	}
	return v.inst
}

// Destroy ends a guest at once, as pulling its plug would, and waits until
// nothing of its process is left.
func (d *Driver) Destroy(ctx context.Context, name string) error {
	v, err := d.lookup(name)
	if err != nil {
		return err
	}
	done, err := v.begin("destroy", hypervisor.StateStarting, hypervisor.StateRunning, hypervisor.StatePaused, hypervisor.StateStopping, hypervisor.StateUnreachable)
	if err != nil {
		return err
	}
	defer done()
	if i := v.info(); i.State == hypervisor.StateUnreachable && i.PID == 0 {
		return &hypervisor.StateError{Guest: name, Operation: "destroy", State: i.State} // there may be a process that we cannot find
	}
	if err := v.end(ctx, hypervisor.End{Cause: hypervisor.EndDestroyed}); err != nil {
		return fmt.Errorf("destroy guest %s: %w", name, err)
	}
	return nil
}

// end retires the guest's process, if it has one, and waits for its end.
func (v *vm) end(ctx context.Context, end hypervisor.End) error {
	v.mu.Lock()
	inst := v.inst
	v.mu.Unlock()
	if inst == nil {
		return nil
	}
	v.retire(inst, end)
	select {
	case <-inst.ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("QEMU (process %d) does not end: %w", inst.proc.id.PID, ctx.Err())
	case <-v.d.ctx.Done():
		return errors.New("the driver was closed")
	}
}
