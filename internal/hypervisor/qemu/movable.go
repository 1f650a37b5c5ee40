package qemu

import (
	"context"
	"fmt"
	"strings"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/migrate"
)

// unmovable are device types that keep a guest from being moved directly,
// with why.
var unmovable = []struct{ prefix, why string }{
	{"vfio-", "hardware given to the guest writes its memory unseen by the dirty-page tracker"},
	{"vhost-user-", "another process writes the guest's memory unseen by the dirty-page tracker"},
	{"vhost-vdpa", "hardware writes the guest's memory unseen by the dirty-page tracker"},
	{"ivshmem", "its memory is shared with other processes of this host"},
	{"tpm-", "the state of a TPM lies outside of QEMU"},
	{"usb-host", "a USB device of this host cannot follow the guest"},
	{"scsi-generic", "its state lies in a device of this host"},
	{"pc-dimm", "its memory is not in the guest's memory file"},
	{"nvdimm", "its memory is not in the guest's memory file"},
	{"virtio-mem", "its memory is not in the guest's memory file"},
	{"virtio-pmem", "its memory is not in the guest's memory file"},
}

// Movable says what forbids to move this guest.
func (g *Guest) Movable(ctx context.Context) error {
	e, err := g.Examine(ctx)
	if err != nil {
		return err
	}
	return e.For(migrate.Direct).Refusal()
}

// Examine says what speaks for and against moving this guest.
func (g *Guest) Examine(ctx context.Context) (*hypervisor.Examination, error) {
	var e hypervisor.Examination
	runstate, err := g.v.queryStatus(ctx, g.inst)
	if err != nil {
		return nil, fmt.Errorf("look at guest %s: %w", g.Name(), err)
	}
	if runstate == "running" {
		e.Any.Pass("state", "%s", runstate)
	} else {
		e.Any.Fail("state", fmt.Sprintf("the guest is not running (QEMU says %s)", runstate), "let it go on first")
	}
	if err := g.examineDevices(ctx, &e.Direct); err != nil {
		return nil, err
	}
	if err := g.examineMemory(ctx, &e.Direct); err != nil {
		return nil, err
	}
	return &e, g.examineBlockers(ctx, &e.Any)
}

// examineDevices looks for devices that keep the guest from being moved.
func (g *Guest) examineDevices(ctx context.Context, c *hypervisor.Checks) error {
	devices, err := g.devices(ctx)
	if err != nil {
		return err
	}
	found := len(*c)
	for _, d := range devices {
		if why := whyUnmovable(d.kind); why != "" {
			c.Fail("device "+d.name, fmt.Sprintf("the device %s (%s) cannot be moved: %s", d.name, d.kind, why), "unplug it first")
		}
	}
	examineArguments(g.v.def.ExtraArguments, c)
	if len(*c) == found {
		c.Pass("devices", "%d, none that could not be moved", len(devices))
	}
	return nil
}

// Discards says whether the guest can give pages back.
func (g *Guest) Discards(ctx context.Context) (bool, error) {
	devices, err := g.devices(ctx)
	if err != nil {
		return false, err
	}
	for _, d := range devices {
		if strings.HasPrefix(d.kind, "virtio-balloon") {
			return true, nil
		}
	}
	return false, nil
}

// device is a device that somebody asked for, on the command line or later.
type device struct{ name, kind string }

type qomProperty struct {
	Name string `json:"name"`
	Type string `json:"type"`
}

// child is the type of a child object, empty for any other property.
func (p qomProperty) child() string {
	kind, found := strings.CutPrefix(p.Type, "child<")
	if !found {
		return ""
	}
	return strings.TrimSuffix(kind, ">")
}

func (g *Guest) list(ctx context.Context, path string) ([]qomProperty, error) {
	var list []qomProperty
	if err := g.v.monitor(g.inst).run(ctx, "qom-list", object{"path": path}, &list); err != nil {
		return nil, fmt.Errorf("look at %s of guest %s: %w", path, g.Name(), err)
	}
	return list, nil
}

func (g *Guest) devices(ctx context.Context) ([]device, error) {
	var devices []device
	for _, path := range []string{"/machine/peripheral", "/machine/peripheral-anon"} {
		list, err := g.list(ctx, path)
		if err != nil {
			return nil, err
		}
		for _, p := range list {
			if kind := p.child(); kind != "" {
				devices = append(devices, device{name: p.Name, kind: kind})
			}
		}
	}
	return devices, nil
}

func whyUnmovable(kind string) string {
	for _, u := range unmovable {
		if strings.HasPrefix(kind, u.prefix) {
			return u.why
		}
	}
	return ""
}

// examineMemory looks for memory that is not in the guest's memory file.
func (g *Guest) examineMemory(ctx context.Context, c *hypervisor.Checks) error {
	list, err := g.list(ctx, "/objects")
	if err != nil {
		return err
	}
	found := len(*c)
	for _, p := range list {
		if kind := p.child(); strings.HasPrefix(kind, "memory-backend-") && p.Name != memoryBackend {
			c.Fail("memory "+p.Name, fmt.Sprintf("the memory %s (%s) is not in the guest's memory file", p.Name, kind), "take it out of extra-arguments")
		}
	}
	if len(*c) == found {
		c.Pass("memory backing", "%s in one shared file", g.v.def.Memory)
	}
	return nil
}

// examineArguments looks for what can only be seen on the command line: a
// network back end is no object in QEMU.
func examineArguments(args []string, c *hypervisor.Checks) {
	for i, a := range args {
		if i == 0 || strings.TrimLeft(args[i-1], "-") != "netdev" {
			continue
		}
		for _, kind := range []string{"vhost-user", "vhost-vdpa"} {
			if strings.HasPrefix(a, kind+",") || strings.Contains(a, `"`+kind+`"`) {
				c.Fail("network back end "+a, fmt.Sprintf("the network back end %s cannot be moved: %s", a, whyUnmovable(kind+"-")), "take it out of extra-arguments")
			}
		}
	}
}

// examineBlockers asks for QEMU's own reasons.
func (g *Guest) examineBlockers(ctx context.Context, c *hypervisor.Checks) error {
	status, err := g.queryMigrate(ctx)
	if err != nil {
		return err
	}
	for _, b := range status.Blocked {
		c.Fail("QEMU", "QEMU cannot migrate this guest: "+b, "")
	}
	if len(status.Blocked) == 0 {
		c.Pass("QEMU", "version %s, which has nothing against it", g.v.monitor(g.inst).version)
	}
	return nil
}
