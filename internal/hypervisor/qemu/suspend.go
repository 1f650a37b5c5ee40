package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// stateChannel is the name under which QEMU is given its end of the socket.
const stateChannel = "lmctl-state"

// convergeTimeout is how long QEMU may try to send what is not shared memory
// with the guest running before it is made to stop it regardless.
const convergeTimeout = time.Second

// errGuestEnded says that the guest powered off or crashed by itself.
var errGuestEnded = errors.New("the guest has ended by itself")

// Suspend makes QEMU write the device state to w and stop the guest. When it
// fails, Resume is to be called.
func (g *Guest) Suspend(ctx context.Context, w io.Writer) (time.Time, error) {
	stopped, err := g.suspend(ctx, w)
	if err != nil {
		return time.Time{}, fmt.Errorf("suspend guest %s: %w", g.Name(), err)
	}
	return stopped, nil
}

func (g *Guest) suspend(ctx context.Context, w io.Writer) (time.Time, error) {
	g.v.mu.Lock()
	suspended := g.inst.suspended
	g.v.mu.Unlock()
	if suspended {
		return time.Time{}, errors.New("it is suspended already; resume it first")
	}
	mon := g.v.monitor(g.inst)
	before, err := currentSettings(ctx, mon, sourceSettings)
	if err != nil {
		return time.Time{}, err
	}
	if err := writeJSON(g.v.files.suspension(), before, false); err != nil {
		return time.Time{}, err
	}
	g.v.change(func() { g.inst.suspended, g.v.state = true, hypervisor.StateMigrating })
	if err := sourceSettings.apply(ctx, mon); err != nil {
		return time.Time{}, err
	}
	if err := g.catch(); err != nil {
		return time.Time{}, err
	}
	sub := mon.subscribe()
	defer sub.close()
	if err := g.startStream(ctx, mon, w); err != nil {
		return time.Time{}, err
	}
	return g.awaitStop(ctx, mon, sub)
}

// startStream has QEMU begin its migration into a socket of ours.
func (g *Guest) startStream(ctx context.Context, mon *monitor, w io.Writer) error {
	ours, theirs, err := socketPair(stateChannel)
	if err != nil {
		return err
	}
	err = mon.runWithFile(ctx, "getfd", object{"fdname": stateChannel}, nil, theirs)
	if err = errors.Join(err, theirs.Close()); err != nil {
		return errors.Join(err, ours.Close())
	}
	g.stream = forward(ours, w)
	return mon.run(ctx, "migrate", object{"uri": "fd:" + stateChannel}, nil)
}

// awaitStop waits until the guest stands still and its block I/O has landed:
// QEMU says STOP before it drains, and pre-switchover after.
func (g *Guest) awaitStop(ctx context.Context, mon *monitor, sub *subscription) (time.Time, error) {
	var stopped time.Time
	// listen ends with the stream too; what failed is asked for all the same.
	listen, cancel := context.WithCancelCause(ctx)
	watching := make(chan struct{})
	defer func() { <-watching }()
	defer cancel(nil)
	go func() { // a stream that ends now ended too early
		defer close(watching)
		select {
		case <-g.stream.done:
			cancel(fmt.Errorf("the state stream broke off: %w", g.stream.reason()))
		case <-listen.Done():
		}
	}()
	hurry := time.AfterFunc(convergeTimeout, func() {
		// If this fails, the events will tell.
		_ = mon.run(listen, "migrate-set-parameters", object{"downtime-limit": maxDowntimeLimit}, nil)
	})
	defer hurry.Stop()
	for {
		e, err := sub.next(listen)
		if err != nil {
			if cause := context.Cause(listen); cause != nil {
				err = cause
			}
			return time.Time{}, err
		}
		switch e.Event.Event {
		case "STOP":
			if stopped.IsZero() {
				stopped = e.received
				g.caught.Stopped(e.sent())
			}
		case "SHUTDOWN", "GUEST_PANICKED":
			return time.Time{}, errGuestEnded
		case "MIGRATION":
			switch status := e.text("status"); status {
			case "pre-switchover":
				if stopped.IsZero() {
					return time.Time{}, errGuestEnded // it stood still before
				}
				return stopped, nil
			case "failed", "cancelled", "completed":
				return time.Time{}, g.streamFailure(ctx, failure(ctx, mon, status))
			}
		}
	}
}

// streamFailure adds why the stream broke, if that is why QEMU failed.
func (g *Guest) streamFailure(ctx context.Context, cause error) error {
	select {
	case <-g.stream.done: // QEMU has closed its end, if we have not ours
		if g.stream.err != nil {
			return fmt.Errorf("%w; the state stream: %w", cause, g.stream.err)
		}
	case <-ctx.Done():
	}
	return cause
}

// SaveState has QEMU write the rest of the device state and returns when all
// of it has gone to the writer of Suspend.
func (g *Guest) SaveState(ctx context.Context) error {
	if err := g.saveState(ctx); err != nil {
		return fmt.Errorf("save the device state of guest %s: %w", g.Name(), err)
	}
	return nil
}

func (g *Guest) saveState(ctx context.Context) error {
	if g.stream == nil {
		return errors.New("it was not suspended")
	}
	mon := g.v.monitor(g.inst)
	sub := mon.subscribe()
	defer sub.close()
	g.told = true
	if err := mon.run(ctx, "migrate-continue", object{"state": "pre-switchover"}, nil); err != nil {
		return err
	}
	if err := awaitCompleted(ctx, mon, sub); err != nil {
		return g.streamFailure(ctx, err)
	}
	select {
	case <-g.stream.done:
		return g.stream.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// awaitCompleted waits for the MIGRATION event that ends a migration.
func awaitCompleted(ctx context.Context, mon *monitor, sub *subscription) error {
	for {
		e, err := sub.next(ctx)
		if err != nil {
			return err
		}
		if e.Event.Event != "MIGRATION" {
			continue
		}
		switch status := e.text("status"); status {
		case "completed":
			return nil
		case "failed", "cancelled", "cancelling":
			return failure(ctx, mon, status)
		}
	}
}
