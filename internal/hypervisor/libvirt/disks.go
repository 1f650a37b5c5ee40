package libvirt

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirtxml"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// kind is what a file system is to guests that move.
type kind struct {
	name string
	// shared: libvirt knows that hosts share it, and so leaves the files of a
	// guest alone that has moved on (virFileIsSharedFSType).
	shared bool
	// coherent: what one host has written all others see, flushed or not.
	coherent bool
}

// kinds are file systems by the magic number of statfs(2).
var kinds = map[uint32]kind{
	0x6969:     {"NFS", true, false},
	0xff534d42: {"CIFS", true, false},
	0xfe534d42: {"SMB", true, false},
	0x6b414653: {"AFS", true, false},
	0x5346414f: {"AFS", true, false},
	0x00c36400: {"CephFS", true, true},
	0x01161970: {"GFS2", true, true},
	0x7461636f: {"OCFS2", true, true},
	0x47504653: {"GPFS", true, true},
	0x61636673: {"ACFS", true, true},
	0x65735546: {"a FUSE file system", false, false},
	0x01021997: {"9p", false, false},
	0xef53:     {"ext4", false, false},
	0x58465342: {"XFS", false, false},
	0x9123683e: {"btrfs", false, false},
	0x01021994: {"tmpfs", false, false},
	0x2fc12fc1: {"ZFS", false, false},
	0x794c7630: {"overlayfs", false, false},
}

// fileSystem says what a path is on.
func fileSystem(path string) (kind, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return kind{}, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	if k, ok := kinds[uint32(st.Type)]; ok {
		return k, nil
	}
	return kind{name: fmt.Sprintf("a file system of type %#x", uint32(st.Type))}, nil
}

// cacheOf is how QEMU opens a disk.
func cacheOf(d *libvirtxml.DomainDisk) string {
	if d.Driver == nil || d.Driver.Cache == "" || d.Driver.Cache == "default" {
		return "writeback"
	}
	return d.Driver.Cache
}

// examineDisks says of each disk whether what the guest has written is what the
// other host reads. QEMU flushes before the guest leaves, and drops at the
// destination what the kernel there has cached of a file. With the cache mode
// unsafe it does not flush.
func examineDisks(x *libvirtxml.Domain, c *hypervisor.Checks) {
	if x.Devices == nil {
		return
	}
	for i := range x.Devices.Disks {
		d := &x.Devices.Disks[i]
		name := "disk"
		if d.Target != nil {
			name = "disk " + d.Target.Dev
		}
		path := pathOf(d)
		switch {
		case d.ReadOnly != nil:
			c.Pass(name, "read only")
		case d.Source == nil || path == "" && (d.Source.File != nil || d.Source.Block != nil):
			c.Pass(name, "empty")
		case path == "":
			c.Pass(name, "QEMU reaches it over the network")
		default:
			examineDisk(d, name, path, c)
		}
	}
}

func examineDisk(d *libvirtxml.DomainDisk, name, path string, c *hypervisor.Checks) {
	on := kind{name: "a block device", shared: true}
	if d.Source.Block == nil {
		var err error
		if on, err = fileSystem(path); err != nil {
			c.Err(name, err)
			return
		}
	}
	cache := cacheOf(d)
	detail := fmt.Sprintf("%s, on %s, cache mode %s", path, on.name, cache)
	switch {
	case cache == "unsafe" && !on.coherent:
		c.Fail(name, detail+": what the guest writes may never leave this host", "use the cache mode none")
	case !on.shared:
		c.Warn(name, detail+", which libvirt does not hold for shared by hosts", "see that both hosts have the same file there and not a copy each")
	default:
		c.Pass(name, "%s", detail)
	}
}

// examineOwnership looks for disks that this host's libvirt would give back to
// their owner when the guest has left, or has not come, while the other host's
// QEMU uses them: it does so with dynamic ownership, where it does not know that
// hosts share the file.
func (d *Driver) examineOwnership(x *libvirtxml.Domain, c *hypervisor.Checks) {
	conf, err := readQEMUConf(d.cfg.QEMUConf)
	if err != nil {
		c.Warn("disk ownership", err.Error(), "see that dynamic_ownership in it is 0, unless libvirt knows that hosts share the file system of the disks")
		return
	}
	if !conf.dynamicOwnership || x.Devices == nil {
		return
	}
	for i := range x.Devices.Disks {
		disk := &x.Devices.Disks[i]
		if disk.ReadOnly != nil || disk.Source == nil || disk.Source.File == nil {
			continue
		}
		path := pathOf(disk)
		if on, err := fileSystem(path); err == nil && !on.shared {
			c.Warn("disk ownership", fmt.Sprintf("libvirt changes the owner of %s when a guest comes and goes (dynamic_ownership), and does not hold %s for shared by hosts: it may take the disk from the QEMU that has it", path, on.name),
				"give the file to QEMU's user and set dynamic_ownership = 0 in "+d.cfg.QEMUConf+" on both hosts")
		}
	}
}

// pathOfNVRAM is that of the file with a domain's firmware variables, empty if
// it has none.
func pathOfNVRAM(x *libvirtxml.Domain) string {
	if x.OS == nil || x.OS.NVRam == nil {
		return ""
	}
	n := x.OS.NVRam
	if n.Source != nil && n.Source.File != nil {
		return n.Source.File.File
	}
	return n.NVRam
}

// sizeOfNVRAM is how many bytes it has, 0 without one.
func sizeOfNVRAM(x *libvirtxml.Domain) (int64, error) {
	path := pathOfNVRAM(x)
	if path == "" {
		return 0, nil
	}
	info, err := os.Stat(path)
	if err != nil {
		return 0, fmt.Errorf("firmware variables: %w", err)
	}
	return info.Size(), nil
}

// examineNVRAM sees that there can be a file for the firmware's variables: they
// come with QEMU's state, and QEMU writes all of them to the file when the guest
// goes on here. The file itself libvirt makes of a template if it is missing.
func examineNVRAM(o *offer, x *libvirtxml.Domain, c *hypervisor.Checks) {
	path := pathOfNVRAM(x)
	if path == "" {
		return
	}
	info, err := os.Stat(path)
	switch {
	case err == nil && info.Size() != o.NVRAM:
		c.Fail("NVRAM", fmt.Sprintf("%s has %d bytes here and %d at the source", path, info.Size(), o.NVRAM), "remove it, if no other guest uses it")
	case err == nil:
		c.Pass("NVRAM", "%s is there, and takes the guest's variables", path)
	case !errors.Is(err, fs.ErrNotExist):
		c.Err("NVRAM", err)
	default:
		examineTemplate(path, x.OS.NVRam.Template, c)
	}
}

func examineTemplate(path, template string, c *hypervisor.Checks) {
	if _, err := os.Stat(filepath.Dir(path)); err != nil {
		c.Fail("NVRAM", fmt.Sprintf("there is no folder for %s on this host", path), "make it")
		return
	}
	if template == "" {
		c.Pass("NVRAM", "%s will be made", path)
		return
	}
	if _, err := os.Stat(template); err != nil {
		c.Fail("NVRAM", fmt.Sprintf("%s is to be made of %s, which is not on this host", path, template), "install the source's firmware")
		return
	}
	c.Pass("NVRAM", "%s will be made of %s, and take the guest's variables", path, template)
}
