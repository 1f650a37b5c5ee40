package agent

import (
	"context"
	"errors"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/ledger"
)

// foreign says that the guests belong to a hypervisor that has other users than
// this agent: they come and go by other hands, and are this host's as long as
// they are on it.
func (a *Agent) foreign() bool { return a.cfg.Hypervisor == "libvirt" }

// know brings the record of a foreign guest up to what is there, unless a
// migration has the say about it.
func (a *Agent) know(ctx context.Context, name string) {
	if !a.foreign() || ledger.CheckGuest(name) != nil || a.moves.busy(name) || a.inbound.busy(name) {
		return
	}
	a.following.Lock()
	defer a.following.Unlock()
	record := a.ledger.Get(name)
	info, err := a.driver.Get(name)
	switch {
	case errors.Is(err, hypervisor.ErrNotFound):
		if record.State == ledger.Owned && a.connected() {
			err = a.leave(ctx, name)
		} else {
			err = nil
		}
	case err != nil:
	case record.State != ledger.None && record.State != ledger.Gone && (record.State != ledger.Owned || record.UUID == info.UUID):
	case info.State == hypervisor.StateStopped || info.State == hypervisor.StateRunning || info.State == hypervisor.StatePaused:
		if record.State == ledger.Owned { // another guest of this name
			err = a.leave(ctx, name)
		}
		if err == nil {
			err = a.ledger.Define(ctx, name, info.UUID)
		}
	}
	if err != nil {
		a.log.Warn("a guest's record does not follow what another hand did", "guest", name, "error", err)
	}
}

// leave notes that a foreign guest is no longer on this host. The following is
// held.
func (a *Agent) leave(ctx context.Context, name string) error {
	a.metrics.left(name)
	return errors.Join(a.kept.forget(name), a.ledger.Undefine(ctx, name))
}

// defined notes that an operator has defined a guest here, unless that is known
// already: its definition was lost, and is back, or its hypervisor's word of it
// came first.
func (a *Agent) defined(ctx context.Context, name, uuid string) (known bool, err error) {
	a.following.Lock()
	defer a.following.Unlock()
	switch r := a.ledger.Get(name); r.State {
	case ledger.None, ledger.Gone, ledger.Withdrawn:
	default:
		if r.UUID == uuid {
			return true, nil
		}
	}
	return false, a.ledger.Define(ctx, name, uuid)
}

// undefined notes that an operator has had a guest's definition removed here. Of
// a foreign guest that may be known already, by its hypervisor's word.
func (a *Agent) undefined(ctx context.Context, name string) error {
	a.following.Lock()
	defer a.following.Unlock()
	if a.foreign() && a.ledger.Get(name).State != ledger.Owned {
		return nil
	}
	return a.ledger.Undefine(ctx, name)
}

// connected says whether the driver's list is what is there. One that it cannot
// ask about is unreachable, and of those that it never saw nothing is known.
func (a *Agent) connected() bool {
	c, ok := a.driver.(parted)
	return !ok || c.Connected()
}

// awaitConnection waits until it is.
func (a *Agent) awaitConnection(ctx context.Context) error {
	if c, ok := a.driver.(parted); ok {
		return c.AwaitConnection(ctx)
	}
	return nil
}

// parted is a driver whose hypervisor is a daemon of its own, which may be away.
type parted interface {
	Connected() bool
	AwaitConnection(context.Context) error
}

// knowAll is know for every guest that is here or was.
func (a *Agent) knowAll(ctx context.Context) {
	for _, info := range a.driver.List() {
		a.know(ctx, info.Name)
	}
	for _, r := range a.ledger.List() {
		// One that was lost with its shell is yet to be defined again.
		if _, kept := a.kept.get(r.Guest); !kept {
			a.know(ctx, r.Guest)
		}
	}
}
