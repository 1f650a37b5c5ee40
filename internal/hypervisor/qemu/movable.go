package qemu

import (
	"context"
	"fmt"
	"strings"

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
	var reasons []string
	runstate, err := g.v.queryStatus(ctx, g.inst)
	if err != nil {
		return fmt.Errorf("look at guest %s: %w", g.Name(), err)
	}
	if runstate != "running" {
		reasons = append(reasons, fmt.Sprintf("the guest is not running (QEMU says %s); let it go on first", runstate))
	}
	devices, err := g.devices(ctx)
	if err != nil {
		return err
	}
	for _, d := range devices {
		if why := whyUnmovable(d.kind); why != "" {
			reasons = append(reasons, fmt.Sprintf("the device %s (%s) cannot be moved: %s; unplug it first", d.name, d.kind, why))
		}
	}
	backends, err := g.foreignMemory(ctx)
	if err != nil {
		return err
	}
	reasons = append(reasons, backends...)
	reasons = append(reasons, argumentReasons(g.v.def.ExtraArguments)...)
	blockers, err := g.blockers(ctx)
	if err != nil {
		return err
	}
	reasons = append(reasons, blockers...)
	if len(reasons) > 0 {
		return &migrate.Refusal{Reasons: reasons}
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

// foreignMemory names the memory that is not in the guest's memory file.
func (g *Guest) foreignMemory(ctx context.Context) ([]string, error) {
	list, err := g.list(ctx, "/objects")
	if err != nil {
		return nil, err
	}
	var reasons []string
	for _, p := range list {
		if kind := p.child(); strings.HasPrefix(kind, "memory-backend-") && p.Name != memoryBackend {
			reasons = append(reasons, fmt.Sprintf("the memory %s (%s) is not in the guest's memory file; take it out of extra-arguments", p.Name, kind))
		}
	}
	return reasons, nil
}

// argumentReasons looks for what can only be seen on the command line: a
// network back end is no object in QEMU.
func argumentReasons(args []string) []string {
	var reasons []string
	for i, a := range args {
		if i == 0 || strings.TrimLeft(args[i-1], "-") != "netdev" {
			continue
		}
		for _, kind := range []string{"vhost-user", "vhost-vdpa"} {
			if strings.HasPrefix(a, kind+",") || strings.Contains(a, `"`+kind+`"`) {
				reasons = append(reasons, fmt.Sprintf("the network back end %s cannot be moved: %s; take it out of extra-arguments", a, whyUnmovable(kind+"-")))
			}
		}
	}
	return reasons
}

// blockers are QEMU's own reasons.
func (g *Guest) blockers(ctx context.Context) ([]string, error) {
	status, err := g.queryMigrate(ctx)
	if err != nil {
		return nil, err
	}
	reasons := make([]string, len(status.Blocked))
	for i, b := range status.Blocked {
		reasons[i] = "QEMU cannot migrate this guest: " + b
	}
	return reasons, nil
}
