package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/migrate/announce"
)

// Config is what a Driver needs to know. The three directories belong to this
// driver alone.
type Config struct {
	StateDir  string // survives the host: definitions, records, logs
	RunDir    string // may be lost with a reboot: sockets, process files
	MemoryDir string // on tmpfs: the guests' RAM
	// MemoryReserve is how many bytes must stay available on the host and in
	// MemoryDir when a guest comes here; 64 MiB by default.
	MemoryReserve int64
	// QEMU and FirmwareDir are this host's, for definitions that set neither:
	// qemu-system-x86_64 of the PATH with its own firmware by default.
	QEMU        string
	FirmwareDir string
	Log         *slog.Logger
	// Announce tells the network where a guest's cards are now and returns the
	// number of addresses announced; announce.Announce by default.
	Announce func(ctx context.Context, nics []announce.NIC) (int, error)
}

// Driver runs the guests of one host as QEMU processes. Its methods may be
// called concurrently.
type Driver struct {
	cfg   Config
	log   *slog.Logger
	links *netlink.Handle // of the network namespace that New was called in
	bins  binaries

	ctx  context.Context // ends with Close
	stop context.CancelFunc
	wg   sync.WaitGroup // the goroutines that watch guests

	watchers hypervisor.Watchers

	mu     sync.Mutex
	guests map[string]*vm
}

// New makes a driver and its directories. Adopt comes next, once.
func New(cfg Config) (*Driver, error) {
	for _, dir := range []string{filepath.Join(cfg.StateDir, "guests"), filepath.Join(cfg.RunDir, "guests"), cfg.MemoryDir} {
		if !filepath.IsAbs(dir) {
			return nil, fmt.Errorf("qemu: directory %q must be an absolute path", dir)
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("qemu: %w", err)
		}
	}
	if err := checkMemoryDir(cfg.MemoryDir); err != nil {
		return nil, err
	}
	links, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("qemu: open netlink: %w", err)
	}
	setDefault(&cfg.QEMU, defaultBinary)
	if cfg.MemoryReserve == 0 {
		cfg.MemoryReserve = 64 << 20
	}
	if cfg.Announce == nil {
		cfg.Announce = func(ctx context.Context, nics []announce.NIC) (int, error) {
			return announce.Announce(ctx, nics, announce.Options{})
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	ctx, stop := context.WithCancel(context.Background())
	return &Driver{
		cfg: cfg, log: cfg.Log, links: links, ctx: ctx, stop: stop,
		bins:   binaries{path: cfg.QEMU, firmware: cfg.FirmwareDir},
		guests: make(map[string]*vm),
	}, nil
}

// checkMemoryDir accepts tmpfs only: on a disk's file system QEMU would write
// the guest's whole RAM out when it has loaded a state, and huge pages are not
// tracked page by page.
func checkMemoryDir(dir string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("qemu: memory directory %s: %w", dir, err)
	}
	if fs.Type != unix.TMPFS_MAGIC {
		return fmt.Errorf("qemu: the memory directory %s is not on tmpfs; choose one below /dev/shm, or mount a tmpfs there", dir)
	}
	return nil
}

// Close stops watching the guests and lets them go on.
func (d *Driver) Close() error {
	d.stop()
	d.wg.Wait()
	d.mu.Lock()
	guests := make([]*vm, 0, len(d.guests))
	for _, v := range d.guests {
		guests = append(guests, v)
	}
	d.mu.Unlock()
	d.watchers.Close()
	var errs []error
	for _, v := range guests {
		errs = append(errs, v.letGo())
	}
	d.links.Close()
	return errors.Join(errs...)
}

// Define stores a guest's definition, a YAML text.
func (d *Driver) Define(text []byte) (hypervisor.Info, error) {
	def, err := ParseDefinition(text)
	if err != nil {
		return hypervisor.Info{}, err
	}
	v := d.newVM(def)
	if err := d.add(v); err != nil {
		return hypervisor.Info{}, fmt.Errorf("define guest %s: %w", def.Name, err)
	}
	if err := v.store(); err != nil {
		d.remove(v)
		return hypervisor.Info{}, fmt.Errorf("define guest %s: %w", def.Name, err)
	}
	v.setState(hypervisor.StateStopped)
	return v.info(), nil
}

// Definition is a guest's definition with what was filled in, a YAML text.
func (d *Driver) Definition(name string) ([]byte, error) {
	v, err := d.lookup(name)
	if err != nil {
		return nil, err
	}
	return v.def.YAML()
}

// Identify says whose definition a YAML text is.
func (d *Driver) Identify(text []byte) (name, uuid string, err error) {
	def, err := ParseDefinition(text)
	if err != nil {
		return "", "", err
	}
	return def.Name, def.UUID, nil
}

// Undefine removes a stopped guest's definition, record and logs. Its disks
// stay.
func (d *Driver) Undefine(name string) error {
	v, err := d.lookup(name)
	if err != nil {
		return err
	}
	done, err := v.begin("undefine", hypervisor.StateStopped)
	if err != nil {
		return err
	}
	defer done()
	if err := v.erase(); err != nil {
		return fmt.Errorf("undefine guest %s: %w", name, err)
	}
	d.remove(v)
	return nil
}

// List describes all guests of this host, by name.
func (d *Driver) List() []hypervisor.Info {
	d.mu.Lock()
	guests := make([]*vm, 0, len(d.guests))
	for _, v := range d.guests {
		guests = append(guests, v)
	}
	d.mu.Unlock()
	infos := make([]hypervisor.Info, len(guests))
	for i, v := range guests {
		infos[i] = v.info()
	}
	slices.SortFunc(infos, func(a, b hypervisor.Info) int { return strings.Compare(a.Name, b.Name) })
	return infos
}

// Get describes one guest.
func (d *Driver) Get(name string) (hypervisor.Info, error) {
	v, err := d.lookup(name)
	if err != nil {
		return hypervisor.Info{}, err
	}
	return v.info(), nil
}

// Find describes the guest of a UUID.
func (d *Driver) Find(uuid string) (hypervisor.Info, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, v := range d.guests {
		if v.def.UUID == uuid {
			return v.info(), nil
		}
	}
	return hypervisor.Info{}, fmt.Errorf("guest with UUID %s: %w", uuid, hypervisor.ErrNotFound)
}

// Console is the path of the unix socket of a guest's serial console. It takes
// one client at a time.
func (d *Driver) Console(name string) (string, error) {
	v, err := d.lookup(name)
	if err != nil {
		return "", err
	}
	if i := v.info(); i.PID == 0 {
		return "", &hypervisor.StateError{Guest: name, Operation: "open the console of", State: i.State}
	}
	return v.files.console(), nil
}

func (d *Driver) lookup(name string) (*vm, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v, ok := d.guests[name]
	if !ok {
		return nil, fmt.Errorf("guest %s: %w", name, hypervisor.ErrNotFound)
	}
	return v, nil
}

func (d *Driver) add(v *vm) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, other := range d.guests {
		if other.def.Name == v.def.Name || v.def.UUID != "" && other.def.UUID == v.def.UUID {
			return fmt.Errorf("%w (%s, %s); choose another or remove that one", hypervisor.ErrExists, other.def.Name, other.def.UUID)
		}
	}
	d.guests[v.def.Name] = v
	return nil
}

func (d *Driver) remove(v *vm) {
	d.mu.Lock()
	if d.guests[v.def.Name] == v {
		delete(d.guests, v.def.Name)
	}
	d.mu.Unlock()
}
