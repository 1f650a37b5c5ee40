package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// neverRan are the states of a QEMU whose CPUs have not run yet.
var neverRan = []string{"prelaunch", "inmigrate"}

// endUnnoted ends the QEMU of an agent that died between starting it and noting
// its process. It is found by the socket that the agent made for it, and its CPUs
// have not run: an agent notes a process before it has those start.
func (v *vm) endUnnoted(ctx context.Context) error {
	for {
		mon, err := dialMonitor(ctx, v.files.qmp())
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
			return nil // nobody listens
		case err == nil:
			return errors.Join(v.quitUnnoted(ctx, mon), mon.close())
		}
		// The connection broke: it is ending, and then nobody will listen.
		timer := time.NewTimer(redialPause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("a QEMU that an earlier agent was starting: %w", err)
		}
	}
}

func (v *vm) quitUnnoted(ctx context.Context, mon *monitor) error {
	var status struct {
		Status string `json:"status"`
	}
	if err := mon.run(ctx, "query-status", nil, &status); err != nil {
		return err
	}
	if !slices.Contains(neverRan, status.Status) {
		return fmt.Errorf("its QEMU is %s, and %s, which says which process that is, is not there", status.Status, v.files.process())
	}
	v.d.log.Info("ending the QEMU that an earlier agent was starting", "guest", v.def.Name)
	if err := mon.run(ctx, "quit", nil, nil); err != nil && !errors.Is(err, errMonitorClosed) {
		return err
	}
	select {
	case <-mon.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the QEMU that an earlier agent was starting does not end: %w", ctx.Err())
	}
}
