package libvirt

import (
	"context"
	"errors"
	"fmt"
	"net"

	lv "github.com/digitalocean/go-libvirt"
	"github.com/dustin/go-humanize"
	"libvirt.org/go/libvirtxml"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/storage"
	"github.com/lmctl/lmctl/internal/sys"
	"github.com/lmctl/lmctl/migrate"
)

// Movable says what forbids to move this domain directly.
func (s *Guest) Movable(ctx context.Context) error {
	l, err := s.g.d.conn.get()
	if err != nil {
		return fmt.Errorf("look at guest %s: %w", s.g.name, err)
	}
	if err := s.g.look(ctx, l); err != nil {
		return fmt.Errorf("look at guest %s: %w", s.g.name, err)
	}
	reasons, err := s.g.anyModeReasons(ctx, l)
	if err != nil {
		return fmt.Errorf("look at guest %s: %w", s.g.name, err)
	}
	s.g.mu.Lock()
	f := s.g.facts
	s.g.mu.Unlock()
	reasons = append(reasons, deviceReasons(f.xml)...)
	if reasons = append(reasons, s.memoryReasons()...); len(reasons) > 0 {
		return &migrate.Refusal{Reasons: reasons}
	}
	return nil
}

// memoryReasons says what forbids to copy the memory.
func (s *Guest) memoryReasons() []string {
	if _, err := s.Memory(context.Background()); err != nil {
		return []string{err.Error()}
	}
	return nil
}

// libvirtReasons says what libvirt or QEMU have against it.
func (g *domain) libvirtReasons(ctx context.Context, l *link) ([]string, error) {
	var reasons []string
	if n, err := l.DomainSnapshotNum(g.ref(), 0); err != nil {
		return nil, err
	} else if n > 0 {
		reasons = append(reasons, fmt.Sprintf("it has %d snapshots, of which the destination would know nothing; delete them first (virsh snapshot-delete)", n))
	}
	if saved, err := l.DomainHasManagedSaveImage(g.ref(), 0); err != nil {
		return nil, err
	} else if saved != 0 {
		reasons = append(reasons, "it has a managed save image, which would stay behind; remove it first (virsh managedsave-remove)")
	}
	var status struct {
		Status  string   `json:"status"`
		Blocked []string `json:"blocked-reasons"`
	}
	if err := g.monitor(ctx, l, "query-migrate", nil, &status); err != nil {
		return nil, err
	}
	for _, b := range status.Blocked {
		reasons = append(reasons, "QEMU cannot migrate this guest: "+b)
	}
	return reasons, nil
}

// deviceReasons names the devices that keep a domain from being moved directly.
func deviceReasons(x *libvirtxml.Domain) []string {
	if x == nil || x.Devices == nil {
		return nil
	}
	var reasons []string
	say := func(device, why string) {
		reasons = append(reasons, fmt.Sprintf("the device %s cannot be moved: %s; detach it first", device, why))
	}
	const (
		hardware = "hardware given to the guest writes its memory unseen by the dirty-page tracker"
		process  = "another process writes the guest's memory unseen by the dirty-page tracker"
	)
	d := x.Devices
	for range d.Hostdevs {
		say("hostdev", hardware)
	}
	for i := range d.Interfaces {
		switch s := d.Interfaces[i].Source; {
		case s == nil:
		case s.VHostUser != nil:
			say("vhostuser interface", process)
		case s.Hostdev != nil:
			say("hostdev interface", hardware)
		case s.VDPA != nil:
			say("vdpa interface", hardware)
		case s.Direct != nil:
			say("macvtap interface on "+s.Direct.Dev, "its frames are not on a bridge that the guest could be announced on")
		}
	}
	for i := range d.Disks {
		if s := d.Disks[i].Source; s != nil && s.VHostUser != nil {
			say("vhostuser disk", process)
		}
	}
	for i := range d.Filesystems {
		if f := &d.Filesystems[i]; f.Driver != nil && f.Driver.Type == "virtiofs" {
			say("virtiofs file system", process)
		} else {
			say("file system", "a folder of this host cannot follow the guest")
		}
	}
	for range d.Shmems {
		say("shmem", "its memory is shared with other processes of this host")
	}
	for range d.Memorydevs {
		say("memory device", "its memory is not in the guest's memory files")
	}
	return reasons
}

// gatherFiles looks at every file of a domain, in a fixed order. Its error joins
// one for each that cannot be used.
func gatherFiles(x *libvirtxml.Domain) ([]storage.Facts, error) {
	var facts []storage.Facts
	var errs []error
	add := func(f storage.Facts, err error) { facts, errs = append(facts, f), append(errs, err) }
	if o := x.OS; o != nil {
		for _, path := range []string{loaderOf(o), o.Kernel, o.Initrd} {
			if path != "" {
				add(storage.OfContent(path))
			}
		}
	}
	if x.Devices == nil {
		return facts, nil
	}
	for i := range x.Devices.Disks {
		disk := &x.Devices.Disks[i]
		path := pathOf(disk)
		switch {
		case path == "":
		case disk.ReadOnly != nil:
			add(storage.OfContent(path))
		default:
			format := ""
			if disk.Driver != nil {
				format = disk.Driver.Type
			}
			add(storage.OfDisk(path, format))
		}
	}
	return facts, errors.Join(errs...)
}

func loaderOf(o *libvirtxml.DomainOS) string {
	if o.Loader == nil {
		return ""
	}
	return o.Loader.Path
}

// pathOf is a disk's on the host, empty if it has none: an empty drive, or one
// that QEMU reaches over the network.
func pathOf(d *libvirtxml.DomainDisk) string {
	switch {
	case d.Source == nil:
	case d.Source.File != nil:
		return d.Source.File.File
	case d.Source.Block != nil:
		return d.Source.Block.Dev
	}
	return ""
}

// examine compares this host with what a domain needs.
func (d *Driver) examine(ctx context.Context, l *link, o *offer, x *libvirtxml.Domain) ([]string, error) {
	var reasons []string
	here, err := gatherFiles(x)
	if err != nil {
		reasons = append(reasons, storage.Reasons(err)...)
	} else if len(here) != len(o.Files) {
		reasons = append(reasons, fmt.Sprintf("the source describes %d files, its XML names %d", len(o.Files), len(here)))
	} else {
		for i := range here {
			if here[i].Path != o.Files[i].Path {
				reasons = append(reasons, fmt.Sprintf("the source describes the file %q in the place of %q", o.Files[i].Path, here[i].Path))
				continue
			}
			reasons = append(reasons, here[i].Compare(o.Files[i])...)
		}
	}
	reasons = append(reasons, bridgeReasons(x)...)
	reasons = append(reasons, d.memoryShort(o)...)
	version, err := l.ConnectGetVersion()
	if err != nil {
		return nil, err
	}
	if version < o.QEMU {
		reasons = append(reasons, fmt.Sprintf("QEMU %s here is older than the source's %s; upgrade it", VersionWords(version), VersionWords(o.QEMU)))
	}
	names, err := d.nameReasons(ctx, l, x)
	return append(reasons, names...), err
}

// memoryShort says whether the domain's memory is more than this host has. Its
// holes may never be filled, but nobody can tell now.
func (d *Driver) memoryShort(o *offer) []string {
	f, err := parseFacts(o.XML)
	if err != nil {
		return []string{err.Error()}
	}
	_, available, err := sys.Memory()
	if err != nil {
		return []string{err.Error()}
	}
	if available-d.cfg.MemoryReserve >= f.memory {
		return nil
	}
	words := func(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }
	return []string{fmt.Sprintf("this host has %s of memory available, of which %s stay in reserve, and the guest needs %s; free some, or choose another host",
		words(available), words(d.cfg.MemoryReserve), words(f.memory))}
}

// bridgeReasons names the bridges that this host lacks.
func bridgeReasons(x *libvirtxml.Domain) []string {
	if x.Devices == nil {
		return nil
	}
	var reasons []string
	for i := range x.Devices.Interfaces {
		s := x.Devices.Interfaces[i].Source
		if s == nil || s.Bridge == nil {
			continue
		}
		if _, err := net.InterfaceByName(s.Bridge.Bridge); err != nil {
			reasons = append(reasons, fmt.Sprintf("there is no bridge %s on this host; create it: ip link add %s type bridge", s.Bridge.Bridge, s.Bridge.Bridge))
		}
	}
	return reasons
}

// nameReasons says what has the domain's name or UUID here.
func (d *Driver) nameReasons(ctx context.Context, l *link, x *libvirtxml.Domain) ([]string, error) {
	doms, err := call(ctx, l, func(l *link) ([]lv.Domain, error) {
		doms, _, err := l.ConnectListAllDomains(1, 0)
		return doms, err
	})
	if err != nil {
		return nil, err
	}
	var reasons []string
	for _, dom := range doms {
		g := d.of(dom)
		switch {
		case g.name == x.Name && g.uuid == x.UUID && g.info().State == hypervisor.StateStopped:
			reasons = append(reasons, fmt.Sprintf("this guest is defined on this host already, as after a virsh migrate without --undefinesource, and could be started here too; remove that: virsh undefine --keep-nvram %s", g.name))
		case g.name == x.Name:
			reasons = append(reasons, fmt.Sprintf("there is already a guest named %s on this host (%s, %s); remove or rename one of them", g.name, g.uuid, g.info().State))
		case g.uuid == x.UUID:
			reasons = append(reasons, fmt.Sprintf("guest %s of this host has the same UUID %s; remove one of them", g.name, g.uuid))
		}
	}
	return reasons, nil
}
