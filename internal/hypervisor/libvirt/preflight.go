package libvirt

import (
	"context"
	"fmt"

	"libvirt.org/go/libvirtxml"

	"github.com/lmctl/lmctl/internal/hypervisor/storage"
	"github.com/lmctl/lmctl/migrate"
)

// Movable says what forbids to move this domain directly.
func (s *Guest) Movable(ctx context.Context) error { return s.refusal(ctx, migrate.Direct) }

// Relayable says what forbids to have QEMU copy this domain's memory.
func (s *Guest) Relayable(ctx context.Context) error { return s.refusal(ctx, migrate.Relay) }

func (s *Guest) refusal(ctx context.Context, mode migrate.Mode) error {
	e, err := s.Examine(ctx)
	if err != nil {
		return err
	}
	return e.For(mode).Refusal()
}

// memoryReasons says what forbids to copy the memory.
func (s *Guest) memoryReasons() []string {
	if _, err := s.Memory(context.Background()); err != nil {
		return []string{err.Error()}
	}
	return nil
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

// gatherFiles looks at every file of a domain, in a fixed order.
func gatherFiles(x *libvirtxml.Domain) []storage.Seen {
	var seen []storage.Seen
	if o := x.OS; o != nil {
		for _, path := range []string{loaderOf(o), o.Kernel, o.Initrd} {
			if path != "" {
				seen = append(seen, storage.Content(path))
			}
		}
	}
	if x.Devices == nil {
		return seen
	}
	for i := range x.Devices.Disks {
		disk := &x.Devices.Disks[i]
		path := pathOf(disk)
		switch {
		case path == "":
		case disk.ReadOnly != nil:
			seen = append(seen, storage.Content(path))
		default:
			seen = append(seen, storage.Disk(path, formatOf(disk))...)
		}
	}
	return seen
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

// formatOf is that of a disk's image, empty if nothing says.
func formatOf(d *libvirtxml.DomainDisk) string {
	if d.Driver == nil {
		return ""
	}
	return d.Driver.Type
}
