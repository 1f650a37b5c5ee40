package libvirt

import (
	"context"
	"errors"
	"fmt"
	"time"

	lv "github.com/digitalocean/go-libvirt"
	"github.com/google/uuid"
	"libvirt.org/go/libvirtxml"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// commandTimeout bounds what libvirtd is asked to do at once.
const commandTimeout = time.Minute

// Define defines a persistent domain by its XML.
func (d *Driver) Define(text []byte) (hypervisor.Info, error) {
	name, id, err := d.Identify(text)
	if err != nil {
		return hypervisor.Info{}, err
	}
	ctx, cancel := context.WithTimeout(d.ctx, commandTimeout)
	defer cancel()
	l, err := d.conn.get()
	if err != nil {
		return hypervisor.Info{}, fmt.Errorf("define guest %s: %w", name, err)
	}
	for _, g := range d.all() {
		if g.name == name && (id == "" || g.uuid != id) || g.name != name && id != "" && g.uuid == id {
			return hypervisor.Info{}, fmt.Errorf("define guest %s: %w", name, hypervisor.ErrExists)
		}
	}
	dom, err := d.defineXML(ctx, l, name, id, string(text))
	if err != nil {
		return hypervisor.Info{}, fmt.Errorf("define guest %s: %w", name, err)
	}
	g := d.of(dom)
	if err := g.look(ctx, l); err != nil {
		return hypervisor.Info{}, fmt.Errorf("define guest %s: %w", name, err)
	}
	return g.info(), nil
}

// Identify says whose definition a domain XML is. A UUID that it leaves to
// libvirt is empty.
func (d *Driver) Identify(text []byte) (name, id string, err error) {
	var x libvirtxml.Domain
	if err := x.Unmarshal(string(text)); err != nil {
		return "", "", fmt.Errorf("libvirt: the definition is no domain XML: %w", err)
	}
	if x.Name == "" {
		return "", "", errors.New("libvirt: the domain XML has no name")
	}
	if x.UUID == "" {
		return x.Name, "", nil
	}
	parsed, err := uuid.Parse(x.UUID)
	if err != nil {
		return "", "", fmt.Errorf("libvirt: the domain XML has the UUID %q: %w", x.UUID, err)
	}
	return x.Name, parsed.String(), nil
}

// Definition is the XML from which the domain can be defined again.
func (d *Driver) Definition(name string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(d.ctx, commandTimeout)
	defer cancel()
	l, g, err := d.reach(name)
	if err != nil {
		return nil, err
	}
	if text, ok := g.expected(); ok {
		return []byte(text), nil
	}
	text, err := g.inactiveXML(ctx, l)
	return []byte(text), orGone(err)
}

// orGone says of a domain that libvirt knows no more, and that we are only about
// to hear of, that it is not there.
func orGone(err error) error {
	if isCode(err, lv.ErrNoDomain) {
		return fmt.Errorf("%w: %w", hypervisor.ErrNotFound, err)
	}
	return err
}

// expected is the definition of a domain that is on its way here, or not defined
// here yet: libvirt's own of it ends with its process.
func (g *domain) expected() (string, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.arriving != nil && g.arriving.Persistent != "" {
		return g.arriving.Persistent, true
	}
	if g.shell == nil {
		return "", false
	}
	if text := g.shell.record.Persistent; text != "" {
		return text, true
	}
	return g.shell.definition, g.shell.definition != ""
}

// inactiveXML is the domain's XML for its next start, with its secrets.
func (g *domain) inactiveXML(ctx context.Context, l *link) (string, error) {
	text, err := call(ctx, l, func(l *link) (string, error) {
		return l.DomainGetXMLDesc(g.ref(), lv.DomainXMLInactive|lv.DomainXMLSecure)
	})
	if err != nil {
		return "", fmt.Errorf("definition of guest %s: %w", g.name, err)
	}
	return text, nil
}

// reach finds a domain, and libvirtd.
func (d *Driver) reach(name string) (*link, *domain, error) {
	g, err := d.lookup(name)
	if err != nil {
		return nil, nil, err
	}
	l, err := d.conn.get()
	if err != nil {
		return nil, nil, fmt.Errorf("guest %s: %w", name, err)
	}
	return l, g, nil
}

// operate has libvirtd do something to a domain, and looks what came of it.
func (d *Driver) operate(ctx context.Context, name, operation string, request func(*link, *domain) error, allowed ...hypervisor.State) error {
	l, g, err := d.reach(name)
	if err != nil {
		return err
	}
	done, err := g.begin(operation, allowed...)
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	err = orGone(do(ctx, l, func(l *link) error { return request(l, g) }))
	if err != nil {
		err = fmt.Errorf("%s guest %s: %w", operation, name, err)
	}
	return errors.Join(err, g.look(context.WithoutCancel(ctx), l))
}

// Undefine forgets a domain that does not run. Its disks and its NVRAM stay.
func (d *Driver) Undefine(name string) error {
	return d.operate(d.ctx, name, "undefine", func(l *link, g *domain) error {
		g.setArriving(nil) // it need not be defined any more
		return l.DomainUndefineFlags(g.ref(), lv.DomainUndefineKeepNvram)
	}, hypervisor.StateStopped)
}

// Start starts a defined domain.
func (d *Driver) Start(ctx context.Context, name string) error {
	return d.operate(ctx, name, "start", func(l *link, g *domain) error {
		if err := d.notForgotten(ctx, l, g.name, g.uuid); err != nil {
			return err
		}
		return l.DomainCreate(g.ref())
	}, hypervisor.StateStopped)
}

// Destroy ends a domain at once.
func (d *Driver) Destroy(ctx context.Context, name string) error {
	return d.operate(ctx, name, "destroy", func(l *link, g *domain) error { return l.DomainDestroy(g.ref()) },
		hypervisor.StateRunning, hypervisor.StatePaused, hypervisor.StateStopping, hypervisor.StateStarting)
}

// Stop asks a domain to power down and waits until it has.
func (d *Driver) Stop(ctx context.Context, name string, timeout time.Duration) error {
	l, g, err := d.reach(name)
	if err != nil {
		return err
	}
	done, err := g.begin("stop", hypervisor.StateRunning)
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, hypervisor.ErrStillRunning)
	defer cancel()
	if err := g.powerDown(ctx, l); err != nil {
		return fmt.Errorf("stop guest %s: %w", name, err)
	}
	return nil
}

func (g *domain) powerDown(ctx context.Context, l *link) error {
	seen := g.d.watchers.Watch(ctx, g.d.List)
	g.intend(hypervisor.EndStopped)
	if err := do(ctx, l, func(l *link) error { return l.DomainShutdown(g.ref()) }); err != nil {
		g.intend("")
		return err
	}
	for i := range seen {
		if i.UUID == g.uuid && (i.State == hypervisor.StateStopped || i.State == hypervisor.StateRemoved) {
			return nil
		}
	}
	g.intend("")
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return errors.New("the driver was closed")
}
