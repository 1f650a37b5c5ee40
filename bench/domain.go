package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/digitalocean/go-libvirt"
	"google.golang.org/grpc/codes"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/hypervisor"
	driver "github.com/lmctl/lmctl/internal/hypervisor/libvirt"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/migrate"
)

// domain is a guest of the lab's libvirt, moved by commands that are run on the
// host that it is on.
type domain struct {
	b     *bed
	guest lab.Guest
	at    int
}

// command moves a domain.
type command struct {
	argv func(guest, to string) []string
	// account is what is said of the migration: by the command, which wrote out,
	// or by the libvirt of the host that the guest is on.
	account func(ctx context.Context, d *domain, out []byte) (Own, error)
}

var (
	byLmctl = command{
		argv:    func(guest, to string) []string { return []string{"lmctl", "migrate", guest, to, "--json"} },
		account: lmctlAccount,
	}
	byVirsh = command{
		// Unsafe, since libvirt cannot know that the hosts share the lab's storage.
		argv: func(guest, to string) []string {
			return []string{
				"virsh", "migrate", "--live", "--unsafe", "--persistent", "--undefinesource",
				guest, "qemu+tcp://" + to + "/system",
			}
		},
		account: virshAccount,
	}
)

func startDomain(ctx context.Context, b *bed, name string, w Workload, at int) (subject, error) {
	spec := w.program.spec(w.Memory)
	if spec == nil {
		return nil, fmt.Errorf("workload %s is not for libvirt", w.Name)
	}
	spec.Name, spec.Host = name, b.hosts[at]
	g, err := b.lab.StartGuest(ctx, *spec, func(string) {})
	if err != nil {
		return nil, err
	}
	d := &domain{b, g, at}
	if err := d.resume(ctx); err != nil {
		return nil, errors.Join(err, d.close(ctx))
	}
	return d, nil
}

func (d *domain) place() place {
	p := place{host: d.b.hosts[d.at], memory: d.b.lab.MemoryFile(d.b.hosts[d.at], d.guest)}
	if g, err := d.show(d.b.ctx, d.at); err == nil && g != nil {
		p.console, p.pid, p.accelerator = g.ConsolePath, int(g.Pid), g.Accelerator
	}
	return p
}

// next: libvirt has a folder for the memory of each domain, which it names anew
// each time.
func (d *domain) next() (host string, memory coming) {
	host = d.b.hosts[otherHost(d.at)]
	return host, coming{
		folder: filepath.Join(d.b.lab.MemoryDir(host), "libvirt", "qemu"),
		find:   func() (string, error) { return d.b.lab.MemoryFile(host, d.guest), nil },
	}
}

// show is what a host's agent says of the guest; nil if it has none.
func (d *domain) show(ctx context.Context, at int) (g *lmctlv1.Guest, err error) {
	err = d.b.lab.WithAgent(d.b.hosts[at], func(c *api.Client) error {
		g, err = c.Guests.Show(ctx, &lmctlv1.GuestRequest{Name: d.guest.Name})
		return err
	})
	var said *api.Error
	if errors.As(err, &said) && said.Code == codes.NotFound {
		return nil, nil
	}
	return g, err
}

// pause lets it run: nobody else has a guest in this lab.
func (d *domain) pause(context.Context) error { return nil }

// resume waits until the agents have heard where virsh has taken the guest. It
// does not wait for them, and a guest is lmctl's to move only once its agent has
// a record of it, of which nobody tells.
func (d *domain) resume(ctx context.Context) error {
	var missing error
	err := poll(ctx, func() (bool, error) {
		missing = d.known(ctx)
		return missing == nil, nil
	})
	if err != nil {
		return fmt.Errorf("bench: the agents do not learn where guest %s is: %w: %w", d.guest.Name, missing, err)
	}
	return nil
}

func (d *domain) known(ctx context.Context) error {
	here, err := d.show(ctx, d.at)
	if err != nil {
		return err
	}
	there, err := d.show(ctx, otherHost(d.at))
	switch {
	case err != nil:
		return err
	case here == nil || here.State != string(hypervisor.StateRunning) || here.Ownership.GetState() != "owned":
		return fmt.Errorf("%s says: %v", d.b.hosts[d.at], here)
	case there != nil:
		return fmt.Errorf("%s has it too: %v", d.b.hosts[otherHost(d.at)], there)
	}
	return nil
}

// move runs the command on the guest's host. One that is not done in time is
// interrupted, upon which lmctl and virsh alike call the migration off.
func (d *domain) move(ctx context.Context, c Contender) (account, error) {
	argv := c.order.argv(d.guest.Name, d.b.hosts[otherHost(d.at)])
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = patience
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := d.b.lab.Start(d.b.hosts[d.at], cmd); err != nil {
		return nil, err
	}
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%s: called off, not done within %v: %w", argv[0], c.keeper.limit, ctx.Err())
		}
		words := said.Bytes()
		if len(bytes.TrimSpace(words)) == 0 {
			words = out.Bytes()
		}
		return nil, fmt.Errorf("%s: %w: %s", argv[0], err, bytes.TrimSpace(words))
	}
	d.at = otherHost(d.at)
	return func(ctx context.Context) (Own, error) { return c.order.account(ctx, d, out.Bytes()) }, nil
}

// lmctlAccount is what lmctl migrate --json says.
func lmctlAccount(_ context.Context, d *domain, out []byte) (Own, error) {
	var r migrate.Report
	if err := json.Unmarshal(out, &r); err != nil {
		return Own{}, fmt.Errorf("bench: report of lmctl migrate: %w", err)
	}
	if r.Mode != "direct" {
		return Own{}, fmt.Errorf("bench: lmctl has moved guest %s in mode %q, not direct", d.guest.Name, r.Mode)
	}
	return ownReport(&r), nil
}

// virshAccount is what virsh domjobinfo --completed shows.
func virshAccount(ctx context.Context, d *domain, _ []byte) (Own, error) {
	var own Own
	err := d.b.lab.WithLibvirt(ctx, d.b.hosts[d.at], func(v *libvirt.Libvirt) error {
		dom, err := v.DomainLookupByName(d.guest.Name)
		if err != nil {
			return err
		}
		_, said, err := v.DomainGetJobStats(dom, libvirt.DomainJobStatsCompleted)
		own = ownJob(said)
		return err
	})
	return own, err
}

// ownJob picks what is comparable from libvirt's statistics of a job.
func ownJob(said []libvirt.TypedParam) Own {
	var own Own
	for _, p := range said {
		n, ok := p.Value.I.(uint64)
		if !ok {
			continue
		}
		switch p.Field {
		case "downtime": // VIR_DOMAIN_JOB_DOWNTIME, in milliseconds
			own.Downtime = time.Duration(n) * time.Millisecond
		case "memory_iteration": // VIR_DOMAIN_JOB_MEMORY_ITERATION
			own.Passes = int(n)
		}
	}
	return own
}

// close waits for what a migration that was called off still does to the guest,
// at either host: until then it is refused.
func (d *domain) close(ctx context.Context) error {
	var refused error
	err := poll(ctx, func() (bool, error) {
		refused = d.b.lab.RemoveGuest(ctx, d.guest.Name)
		return refused == nil, nil
	})
	if err != nil {
		return fmt.Errorf("bench: guest %s is not to be removed: %w: %w", d.guest.Name, refused, err)
	}
	return nil
}

// libvirtVersion is that of the first host's libvirt.
func libvirtVersion(ctx context.Context, l *lab.Lab) (string, error) {
	var version uint64
	err := l.WithLibvirt(ctx, l.Hosts()[0], func(v *libvirt.Libvirt) (err error) {
		version, err = v.ConnectGetLibVersion()
		return err
	})
	return driver.VersionWords(version), err
}
