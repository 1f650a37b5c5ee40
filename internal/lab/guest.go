package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/lmctl/lmctl/guest/control"
	"github.com/lmctl/lmctl/guest/flat"
	"github.com/lmctl/lmctl/guest/linux"
	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/hypervisor/qemu"
	"github.com/lmctl/lmctl/internal/lab/domain"
)

// Kind is what runs in a guest of the lab.
type Kind string

// The kinds.
const (
	Linux Kind = "linux" // package guest/linux: network, disk, memory checker
	Flat  Kind = "flat"  // package guest/flat: for real KVM everywhere
)

// Unbounded is the dirty rate of a guest that writes as fast as it can.
const Unbounded = -1

// GuestSpec is a guest to start. Name, Kind, Host and Memory must be given.
type GuestSpec struct {
	Name   string `json:"name"`
	Kind   Kind   `json:"kind"`
	Host   string `json:"host"` // where it starts
	Memory int64  `json:"memory"`
	VCPUs  int    `json:"vcpus,omitempty"` // 1 if 0
	// DirtyRate in bytes a second, whole pages at a time; 0 for an idle guest,
	// or Unbounded.
	DirtyRate  int64  `json:"dirty_rate,omitempty"`
	WorkingSet int64  `json:"working_set,omitempty"` // bytes that are dirtied; 64 MiB, or half of a smaller guest, if 0
	Pattern    string `json:"pattern,omitempty"`     // sequential (the default), random or rewrite
	// Disk is the path of a raw image for a Linux guest's disk; one in the
	// lab's storage is made if empty.
	Disk         string              `json:"disk,omitempty"`
	DiskSetting  control.DiskSetting `json:"disk_setting,omitzero"`
	QEMU         string              `json:"qemu,omitempty"` // binary, and its firmware folder
	FirmwareDir  string              `json:"firmware_dir,omitempty"`
	Machine      string              `json:"machine,omitempty"`
	Accelerator  string              `json:"accelerator,omitempty"`
	Shape        domain.Shape        `json:"shape,omitzero"` // with libvirt
	BootPatience time.Duration       `json:"-"`              // until the guest must be ready; 3 minutes if 0
}

// Guest is a guest of the lab, as the lab keeps it in its folder.
type Guest struct {
	GuestSpec
	UUID   string `json:"uuid"`
	Number int    `json:"number"` // of its addresses
	MAC    string `json:"mac"`
}

// Addresses are those of a Linux guest: IPv4, then IPv6.
func (g Guest) Addresses() []netip.Prefix { return addresses(g.Number) }

// flatConfig is what a flat guest does.
func (g Guest) flatConfig() flat.Config {
	c := flat.Config{Memory: g.Memory, Pages: int(g.WorkingSet / flat.PageSize), Rate: flat.Unbounded, Pattern: flat.Pattern(g.Pattern)}
	if g.DirtyRate != Unbounded {
		c.Rate = (g.DirtyRate + flat.PageSize - 1) / flat.PageSize
	}
	return c
}

// settings is what a Linux guest is told.
func (g Guest) settings() control.Settings {
	s := control.Defaults()
	s.Addresses = g.Addresses()
	s.Memory.Rate, s.Memory.WorkingSet = g.DirtyRate, g.WorkingSet
	s.Memory.Pattern = control.Pattern(g.Pattern)
	s.Static = min(s.Static, g.Memory/32)
	s.Seed = uint64(g.Number)
	s.Device, s.Disk = "/dev/vda", g.DiskSetting
	return s
}

func (l *Lab) guestFile(name string) string { return filepath.Join(l.dir, "guests", name+".json") }

// errNoGuest says that a lab has no guest of a name.
var errNoGuest = errors.New("no such guest")

// Guest finds a guest that was started in this lab.
func (l *Lab) Guest(name string) (Guest, error) {
	var g Guest
	if !qemu.ValidName(name) {
		return g, fmt.Errorf("lab: %q is no name for a guest", name)
	}
	b, err := os.ReadFile(l.guestFile(name))
	if errors.Is(err, os.ErrNotExist) {
		return g, fmt.Errorf("lab: %w: %s", errNoGuest, name)
	}
	if err != nil {
		return g, fmt.Errorf("lab: %w", err)
	}
	if err := json.Unmarshal(b, &g); err != nil {
		return g, fmt.Errorf("lab: %s: %w", l.guestFile(name), err)
	}
	return g, nil
}

// Guests are all guests of this lab, by name.
func (l *Lab) Guests() ([]Guest, error) {
	files, err := filepath.Glob(filepath.Join(l.dir, "guests", "*.json"))
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	guests := make([]Guest, 0, len(files))
	for _, f := range files {
		g, err := l.Guest(strings.TrimSuffix(filepath.Base(f), ".json"))
		if errors.Is(err, errNoGuest) {
			continue // somebody has removed it meanwhile
		}
		if err != nil {
			return nil, err
		}
		guests = append(guests, g)
	}
	return guests, nil
}

// register gives a guest what is to be unique in the lab, and keeps it.
func (l *Lab) register(spec GuestSpec) (Guest, error) {
	f, err := os.Open(filepath.Join(l.dir, "guests"))
	if err != nil {
		return Guest{}, fmt.Errorf("lab: %w", err)
	}
	defer f.Close()
	// Held for as long as it takes to write a small file.
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return Guest{}, fmt.Errorf("lab: lock the guests: %w", err)
	}
	guests, err := l.Guests()
	if err != nil {
		return Guest{}, err
	}
	if slices.ContainsFunc(guests, func(g Guest) bool { return g.Name == spec.Name }) {
		return Guest{}, fmt.Errorf("lab: there is a guest %s already", spec.Name)
	}
	g := Guest{GuestSpec: spec, UUID: uuid.NewString(), Number: firstGuest}
	for slices.ContainsFunc(guests, func(o Guest) bool { return o.Number == g.Number }) {
		g.Number++
	}
	if g.Number > lastGuest {
		return Guest{}, errors.New("lab: no address is left for another guest")
	}
	g.MAC = fmt.Sprintf("52:54:00:4c:4d:%02x", g.Number)
	b, err := json.MarshalIndent(g, "", "  ")
	if err != nil {
		return Guest{}, fmt.Errorf("lab: %w", err)
	}
	return g, writeWhole(l.guestFile(g.Name), append(b, '\n'))
}

// complete fills in what the caller left open, and says what is wrong.
func (l *Lab) complete(s *GuestSpec) error {
	if !qemu.ValidName(s.Name) {
		return fmt.Errorf("lab: %q is no name for a guest", s.Name)
	}
	if err := l.isHost(s.Host); err != nil {
		return err
	}
	if err := l.completeDomain(s); err != nil {
		return err
	}
	if s.WorkingSet == 0 {
		s.WorkingSet = min(64<<20, s.Memory/2)
	}
	if s.Pattern == "" {
		s.Pattern = string(control.Sequential)
	}
	if s.VCPUs == 0 {
		s.VCPUs = 1
	}
	if s.BootPatience == 0 {
		s.BootPatience = 3 * time.Minute
	}
	g := Guest{GuestSpec: *s, Number: firstGuest}
	switch s.Kind {
	case Linux:
		if s.Memory < 128<<20 {
			return fmt.Errorf("lab: guest %s: %d bytes of memory: a Linux guest needs 128 MiB", s.Name, s.Memory)
		}
		if err := g.settings().Validate(); err != nil {
			return fmt.Errorf("lab: guest %s: %w", s.Name, err)
		}
	case Flat:
		if _, err := g.flatConfig().Image(); err != nil {
			return fmt.Errorf("lab: guest %s: %w", s.Name, err)
		}
	default:
		return fmt.Errorf("lab: guest %s: no such kind: %q: there are %s and %s", s.Name, s.Kind, Linux, Flat)
	}
	return nil
}

// StartGuest makes a guest, starts it on its host and waits until it is at
// work. On error nothing of it is left.
func (l *Lab) StartGuest(ctx context.Context, spec GuestSpec, say func(string)) (g Guest, err error) {
	if err := l.complete(&spec); err != nil {
		return Guest{}, err
	}
	var boot linux.Boot
	if spec.Kind == Linux {
		if boot, err = prepareLinux(ctx, say); err != nil {
			return Guest{}, err
		}
	}
	if g, err = l.register(spec); err != nil {
		return Guest{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.RemoveGuest(context.WithoutCancel(ctx), g.Name))
		}
	}()
	definition, err := l.define(ctx, &g, boot)
	if err != nil {
		return g, err
	}
	if err := writeWhole(l.definitionFile(g.Name), definition); err != nil {
		return g, err
	}
	if err := l.launchGuest(ctx, g, definition); err != nil {
		return g, err
	}
	ready, cancel := context.WithTimeout(ctx, spec.BootPatience)
	defer cancel()
	return g, l.awaitReady(ready, g)
}

// launchGuest defines and starts a guest. With libvirt it needs no agent.
func (l *Lab) launchGuest(ctx context.Context, g Guest, definition []byte) error {
	if l.Hypervisor() == Libvirt {
		agent, err := l.AgentRuns(g.Host)
		if err != nil {
			return err
		}
		if !agent || g.Shape.Transient {
			return l.startDomain(ctx, g, string(definition))
		}
	}
	return l.WithAgent(g.Host, func(c *api.Client) error {
		if _, err := c.Guests.Define(ctx, &lmctlv1.DefineRequest{Definition: definition}); err != nil {
			return err
		}
		_, err := c.Guests.Start(ctx, &lmctlv1.GuestRequest{Name: g.Name})
		return err
	})
}

// prepareLinux finds or makes what Linux guests boot from. Those who run
// without `make build`, as tests do, name an init in LMCTL_GUEST_INIT.
func prepareLinux(ctx context.Context, say func(string)) (linux.Boot, error) {
	var init []byte
	var err error
	if path := os.Getenv("LMCTL_GUEST_INIT"); path != "" {
		init, err = os.ReadFile(path)
	} else {
		init, err = linux.Init()
	}
	if err != nil {
		return linux.Boot{}, fmt.Errorf("lab: %w", err)
	}
	cache, err := linux.CacheDir()
	if err != nil {
		return linux.Boot{}, fmt.Errorf("lab: %w", err)
	}
	boot, err := linux.Prepare(ctx, cache, init, say)
	if err != nil {
		return linux.Boot{}, fmt.Errorf("lab: %w", err)
	}
	return boot, nil
}

// RemoveGuest ends a guest wherever it is and removes all of it. Agents that do
// not run are not asked.
func (l *Lab) RemoveGuest(ctx context.Context, name string) error {
	g, err := l.Guest(name)
	if err != nil {
		return err
	}
	var errs []error
	for _, host := range l.Hosts() {
		if err := l.removeFrom(ctx, host, name); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	for _, path := range []string{l.ownDisk(g), l.definitionFile(name), l.guestFile(name)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("lab: %w", err)
		}
	}
	return nil
}

func (l *Lab) removeFrom(ctx context.Context, host, name string) error {
	runs, err := l.AgentRuns(host)
	switch {
	case err != nil:
		return err
	case !runs && l.Hypervisor() == Libvirt:
		return l.removeDomain(ctx, host, name)
	case !runs:
		return nil
	}
	return l.WithAgent(host, func(c *api.Client) error {
		g, err := find(ctx, c, name)
		if err != nil || g == nil {
			return err
		}
		if g.State != "stopped" {
			if _, err := c.Guests.Destroy(ctx, &lmctlv1.GuestRequest{Name: name}); err != nil {
				return err
			}
			// A transient domain goes with its end.
			if g, err = find(ctx, c, name); err != nil || g == nil {
				return err
			}
		}
		_, err = c.Guests.Undefine(ctx, &lmctlv1.GuestRequest{Name: name})
		var remote *api.Error
		if errors.As(err, &remote) && remote.Code == codes.NotFound {
			return nil // it has gone meanwhile
		}
		return err
	})
}

// find asks an agent for a guest; nil if it has none of that name.
func find(ctx context.Context, c *api.Client, name string) (*lmctlv1.Guest, error) {
	list, err := c.Guests.List(ctx, &lmctlv1.ListGuestsRequest{})
	if err != nil {
		return nil, err
	}
	for _, g := range list.Guests {
		if g.Name == name {
			return g, nil
		}
	}
	return nil, nil
}

// WithAgent runs f with a client of a host's agent.
func (l *Lab) WithAgent(host string, f func(*api.Client) error) error {
	c, err := api.Dial(api.Target{Socket: l.AgentSocket(host)})
	if err != nil {
		return fmt.Errorf("lab: agent of %s: %w", host, err)
	}
	if err := errors.Join(f(c), c.Close()); err != nil {
		return fmt.Errorf("lab: agent of %s: %w", host, err)
	}
	return nil
}
