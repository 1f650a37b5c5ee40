package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// resumeTimeout bounds Resume. It does not end with the caller's context: a
// cancelled migration is just when the guest must not be left standing.
const resumeTimeout = 60 * time.Second

// Resume lets the guest go on here, whatever became of the migration: nobody
// else may run it. It cancels what QEMU still does, starts the CPUs, puts back
// the settings and checks that the guest runs. It may be repeated, and it also
// ends a suspension that an earlier agent began.
func (g *Guest) Resume(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resumeTimeout)
	defer cancel()
	if err := g.resume(ctx); err != nil {
		return fmt.Errorf("resume guest %s: %w", g.Name(), err)
	}
	return nil
}

func (g *Guest) resume(ctx context.Context) error {
	g.v.mu.Lock()
	suspended := g.inst.suspended
	g.v.mu.Unlock()
	if !suspended {
		return nil
	}
	// QEMU's migration ends by this: see settle.
	if g.stream != nil {
		if err := g.stream.close(); err != nil {
			return err
		}
	}
	if err := g.revive(ctx); err != nil {
		return err
	}
	if err := g.uncatch(); err != nil {
		return err
	}
	if g.stream != nil {
		select {
		case <-g.stream.done:
		case <-ctx.Done():
			return fmt.Errorf("the guest runs, but the state stream's writer does not return: %w", ctx.Err())
		}
		g.stream, g.told = nil, false
	}
	g.v.change(func() { g.inst.suspended = false })
	// What came of the guest meanwhile was left to us.
	g.v.refreshBlind(ctx, g.inst)
	return nil
}

// revive starts the CPUs and puts back the settings.
func (g *Guest) revive(ctx context.Context) error {
	mon := g.v.monitor(g.inst)
	// Whoever suspended it before this agent came may have told it, too.
	if err := settle(ctx, mon, g.told || g.stream == nil); err != nil {
		return err
	}
	runstate, err := g.finalized(ctx, mon)
	if err != nil {
		return err
	}
	if runstate != "running" && !terminal(runstate) {
		if err := mon.run(ctx, "cont", nil, nil); err != nil {
			return err
		}
		if runstate, err = g.v.queryStatus(ctx, g.inst); err != nil {
			return err
		}
	}
	if runstate != "running" && !terminal(runstate) {
		return fmt.Errorf("QEMU says it is %s, not running", runstate)
	}
	return g.v.restore(ctx, mon)
}

// finalized waits until the thread of a migration that is over has let go of
// the guest, which a moment before it refuses to go on, and returns QEMU's state.
func (g *Guest) finalized(ctx context.Context, mon *monitor) (string, error) {
	sub := mon.subscribe() // RESUME, if the guest ran before
	defer sub.close()
	for {
		runstate, err := g.v.queryStatus(ctx, g.inst)
		if err != nil || runstate != "finish-migrate" {
			return runstate, err
		}
		recheck, cancel := context.WithTimeout(ctx, recheckEvery)
		_, err = sub.next(recheck)
		cancel()
		if err != nil && (ctx.Err() != nil || errors.Is(err, errMonitorClosed)) {
			return "", fmt.Errorf("QEMU's migration is over, but it stays %s: %w", runstate, err)
		}
	}
}

// restore puts the migration settings back to what they were.
func (v *vm) restore(ctx context.Context, mon *monitor) error {
	var before settings
	err := readJSON(v.files.suspension(), &before)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // they were not touched
	}
	if err != nil {
		return err
	}
	if err := before.apply(ctx, mon); err != nil {
		return err
	}
	return removeIfThere(v.files.suspension())
}

// Release ends the suspended copy of a guest that another host runs, and
// removes all that belonged to it here but its disks.
func (g *Guest) Release(ctx context.Context) error {
	if err := g.v.release(ctx); err != nil {
		return fmt.Errorf("release guest %s: %w", g.Name(), err)
	}
	return nil
}

// release notes first that the guest is not ours any more: an agent that dies
// in the middle goes on with that when it comes back.
func (v *vm) release(ctx context.Context) error {
	if err := v.updateRecord(func(r *record) { r.Released = true }); err != nil {
		return err
	}
	if err := v.end(ctx, hypervisor.End{Cause: hypervisor.EndMigrated}); err != nil {
		return err
	}
	if err := v.erase(); err != nil {
		return err
	}
	v.d.remove(v)
	return nil
}
