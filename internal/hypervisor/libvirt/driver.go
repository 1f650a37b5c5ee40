package libvirt

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	lv "github.com/digitalocean/go-libvirt"
	"github.com/google/uuid"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/migrate/announce"
)

// Config is what a Driver needs to know.
type Config struct {
	URI    string // of this host's libvirtd, qemu:///system by default
	RunDir string // of this driver; may be lost with a reboot
	// PIDDir is where libvirtd keeps the domains' PID files, /run/libvirt/qemu by
	// default.
	PIDDir string
	// QEMUConf is libvirt's configuration of QEMU, /etc/libvirt/qemu.conf by
	// default.
	QEMUConf string
	// MemoryReserve is how many bytes must stay available on the host when a
	// domain comes here.
	MemoryReserve int64
	Log           *slog.Logger
	// Announce tells the network where a domain's cards are now and returns the
	// number of addresses announced; announce.Announce by default.
	Announce func(ctx context.Context, cards []announce.NIC) (int, error)
}

// Driver moves the domains of one libvirtd. Its methods may be called
// concurrently.
type Driver struct {
	cfg   Config
	log   *slog.Logger
	conn  *connection
	links *netlink.Handle // of the network namespace that New was called in

	ctx  context.Context // ends with Close
	stop context.CancelFunc
	wg   sync.WaitGroup

	watchers hypervisor.Watchers
	swept    bool // what an earlier agent left was taken up; of the connection's goroutine

	mu      sync.Mutex
	domains map[string]*domain // by name
}

var _ hypervisor.Driver = (*Driver)(nil)

// New makes a driver and its folder. Adopt comes next, once.
func New(cfg Config) (*Driver, error) {
	setDefault(&cfg.URI, "qemu:///system")
	setDefault(&cfg.PIDDir, "/run/libvirt/qemu")
	setDefault(&cfg.QEMUConf, "/etc/libvirt/qemu.conf")
	if !filepath.IsAbs(cfg.RunDir) {
		return nil, fmt.Errorf("libvirt: directory %q must be an absolute path", cfg.RunDir)
	}
	conn, err := newConnection(cfg.URI)
	if err != nil {
		return nil, err
	}
	// QEMU's user passes through to the folder of its sockets and reads nothing.
	if err := passable(filepath.Join(cfg.RunDir, "libvirt")); err != nil {
		return nil, fmt.Errorf("libvirt: %w", err)
	}
	links, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("libvirt: open netlink: %w", err)
	}
	if cfg.Announce == nil {
		cfg.Announce = func(ctx context.Context, cards []announce.NIC) (int, error) {
			return announce.Announce(ctx, cards, announce.Options{})
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	ctx, stop := context.WithCancel(context.Background())
	return &Driver{cfg: cfg, log: cfg.Log, conn: conn, links: links, ctx: ctx, stop: stop, domains: make(map[string]*domain)}, nil
}

func setDefault(s *string, value string) {
	if *s == "" {
		*s = value
	}
}

// Adopt connects to libvirtd and finds its domains, and what an earlier agent
// left of its migrations. It fails if libvirtd cannot be reached by the time
// that ctx ends or the first attempt has failed; the driver goes on trying.
func (d *Driver) Adopt(ctx context.Context) error {
	failed := make(chan error, 1)
	d.wg.Go(func() {
		d.conn.keep(d.ctx, d.meet, func(err error) {
			select {
			case failed <- err:
			default:
			}
			d.part(err)
		})
	})
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	met := make(chan error, 1)
	go func() {
		_, err := d.conn.await(ctx)
		met <- err
	}()
	var err error
	select {
	case err = <-failed:
	case err = <-met:
	}
	if err != nil {
		return fmt.Errorf("libvirt: %s: %w", d.cfg.URI, err)
	}
	return nil
}

// Close ends the connection and lets the domains go on.
func (d *Driver) Close() error {
	d.stop()
	d.wg.Wait()
	d.watchers.Close()
	var errs []error
	for _, g := range d.all() {
		errs = append(errs, g.letGo())
	}
	d.links.Close()
	return errors.Join(errs...)
}

func (d *Driver) all() []*domain {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := make([]*domain, 0, len(d.domains))
	for _, g := range d.domains {
		all = append(all, g)
	}
	return all
}

// Connected says whether libvirtd can be asked, so that the domains are those
// that there are.
func (d *Driver) Connected() bool { return d.conn.alive() }

// AwaitConnection waits until libvirtd can be asked.
func (d *Driver) AwaitConnection(ctx context.Context) error {
	_, err := d.conn.await(ctx)
	return err
}

// List describes all domains of this host, by name.
func (d *Driver) List() []hypervisor.Info {
	var infos []hypervisor.Info
	for _, g := range d.all() {
		infos = append(infos, g.info())
	}
	slices.SortFunc(infos, func(a, b hypervisor.Info) int { return strings.Compare(a.Name, b.Name) })
	return infos
}

// Get describes one domain.
func (d *Driver) Get(name string) (hypervisor.Info, error) {
	g, err := d.lookup(name)
	if err != nil {
		return hypervisor.Info{}, err
	}
	return g.info(), nil
}

// Watch sends what becomes of the domains of this host.
func (d *Driver) Watch(ctx context.Context) <-chan hypervisor.Info {
	return d.watchers.Watch(ctx, d.List)
}

func (d *Driver) lookup(name string) (*domain, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	g, ok := d.domains[name]
	if !ok {
		return nil, fmt.Errorf("guest %s: %w", name, hypervisor.ErrNotFound)
	}
	return g, nil
}

// of is the driver's own of a libvirt domain, made if need be.
func (d *Driver) of(dom lv.Domain) *domain {
	id := uuid.UUID(dom.UUID).String()
	d.mu.Lock()
	defer d.mu.Unlock()
	if g := d.domains[dom.Name]; g != nil && g.uuid == id {
		return g
	}
	g := d.newDomain(dom.Name, id)
	d.domains[dom.Name] = g
	return g
}

// forget removes a domain that is no longer there and tells the watchers.
func (d *Driver) forget(g *domain) error {
	d.mu.Lock()
	if d.domains[g.name] == g {
		delete(d.domains, g.name)
	}
	d.mu.Unlock()
	err := g.letGo()
	g.tell(func() { g.gone = true })
	return err
}
