package bench

import (
	"context"
	"errors"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/qemu"
)

// unmanaged is a guest that no agent knows: the bench itself gives QEMU its
// commands, in the order in which libvirt gives them.
type unmanaged struct {
	b      *bed
	name   string
	at     int // index of the host
	source *qemu.Observer
}

func startUnmanaged(ctx context.Context, b *bed, name string, w Workload, at int) (subject, error) {
	definition, err := b.definition(name, w)
	if err != nil {
		return nil, err
	}
	u := &unmanaged{b: b, name: name, at: at}
	for _, host := range b.hosts {
		if _, err := b.drivers[host].Define(definition); err != nil {
			return nil, errors.Join(err, u.close(ctx))
		}
	}
	err = u.on(u.at, func(d *qemu.Driver) error { return d.Start(ctx, name) })
	if err == nil {
		u.source, err = u.observe(ctx, u.at)
	}
	if err != nil {
		return nil, errors.Join(err, u.close(ctx))
	}
	return u, nil
}

func (u *unmanaged) driver(at int) *qemu.Driver { return u.b.drivers[u.b.hosts[at]] }

// on runs f in a host's namespace, for what is to be started there.
func (u *unmanaged) on(at int, f func(*qemu.Driver) error) error {
	return u.b.lab.In(u.b.hosts[at], func() error { return f(u.driver(at)) })
}

func (u *unmanaged) observe(ctx context.Context, at int) (*qemu.Observer, error) {
	i, err := u.driver(at).Get(u.name)
	if err != nil {
		return nil, err
	}
	return qemu.Observe(ctx, i.Observer)
}

func (u *unmanaged) placeAt(at int) place {
	i, err := u.driver(at).Get(u.name)
	if err != nil {
		return place{host: u.b.hosts[at]} // it was removed: nothing of it is anywhere
	}
	return place{
		host: u.b.hosts[at], memory: memoryFile(u.b.ownMemory(u.b.hosts[at]), i.UUID),
		console: i.ConsolePath, pid: i.PID, accelerator: string(i.Accelerator),
	}
}

func (u *unmanaged) place() place { return u.placeAt(u.at) }

func (u *unmanaged) next() (host string, memory coming) {
	p := u.placeAt(otherHost(u.at))
	return p.host, comingAt(p.memory)
}

func (u *unmanaged) pause(ctx context.Context) error {
	return u.source.Run(ctx, "stop", nil, nil)
}

func (u *unmanaged) resume(ctx context.Context) error {
	return u.source.Run(ctx, "cont", nil, nil)
}

// move starts the destination, lets the guest travel there, and ends the source.
func (u *unmanaged) move(ctx context.Context, c Contender) (account, error) {
	to := otherHost(u.at)
	if err := u.on(to, func(d *qemu.Driver) error { return d.StartIncoming(ctx, u.name) }); err != nil {
		return nil, err
	}
	destination, err := u.observe(ctx, to)
	if err != nil {
		return nil, errors.Join(err, u.end(ctx, to, nil))
	}
	own, err := c.travel(ctx, u, destination)
	if err != nil {
		return nil, errors.Join(err, destination.Close())
	}
	if err := u.end(ctx, u.at, u.source); err != nil {
		return nil, errors.Join(err, destination.Close())
	}
	err = u.source.Close()
	u.at, u.source = to, destination
	return said(own), errors.Join(err, u.b.await(ctx, u.b.hosts[to], u.name, hypervisor.StateRunning))
}

// end has the QEMU on a host quit, if there is one, and waits until nothing of
// it is left.
func (u *unmanaged) end(ctx context.Context, at int, o *qemu.Observer) (err error) {
	i, err := u.driver(at).Get(u.name)
	if err != nil || i.PID == 0 {
		return err
	}
	if o == nil {
		if o, err = qemu.Observe(ctx, i.Observer); err != nil {
			// A destination whose source has given up ends by itself.
			if u.b.await(ctx, u.b.hosts[at], u.name, hypervisor.StateStopped) == nil {
				return nil
			}
			return err
		}
		defer func() { err = errors.Join(err, o.Close()) }()
	}
	quit := o.Run(ctx, "quit", nil, nil)
	if err := u.b.await(ctx, u.b.hosts[at], u.name, hypervisor.StateStopped); err != nil {
		return errors.Join(err, quit)
	}
	return nil // whoever ended it: it may have been about to
}

func (u *unmanaged) close(ctx context.Context) error {
	var errs []error
	if u.source != nil {
		errs = append(errs, u.end(ctx, u.at, u.source), u.source.Close())
		u.source = nil
	}
	for at := range u.b.hosts {
		// One that a failed migration left does not always leave its observer
		// free: it may still serve the connection that is being closed.
		errs = append(errs, u.end(ctx, at, nil))
		if err := u.driver(at).Undefine(u.name); err != nil && !errors.Is(err, hypervisor.ErrNotFound) {
			errs = append(errs, err)
		}
	}
	return notFoundIsFine(errs)
}

func notFoundIsFine(errs []error) error {
	var real []error
	for _, err := range errs {
		if err != nil && !errors.Is(err, hypervisor.ErrNotFound) {
			real = append(real, err)
		}
	}
	return errors.Join(real...)
}
