package libvirt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	lv "github.com/digitalocean/go-libvirt"
	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirtxml"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/storage"
	"github.com/lmctl/lmctl/internal/sys"
	"github.com/lmctl/lmctl/migrate"
)

// Examine compares this host with what an offered domain needs, and leaves
// nothing.
func (d *Driver) Examine(ctx context.Context, in migrate.Offer) (hypervisor.Checks, error) {
	o, x, err := understand(in)
	if err != nil {
		var c hypervisor.Checks
		c.Err("definition", err)
		return c, nil
	}
	l, err := d.conn.get()
	if err != nil {
		return nil, fmt.Errorf("examine guest %s: %w", x.Name, err)
	}
	c, err := d.examine(ctx, l, o, x)
	if err != nil {
		return nil, fmt.Errorf("examine guest %s: %w", x.Name, err)
	}
	return c, nil
}

// examine compares this host with what a domain needs.
func (d *Driver) examine(ctx context.Context, l *link, o *offer, x *libvirtxml.Domain) (hypervisor.Checks, error) {
	var c hypervisor.Checks
	if err := examineVersions(ctx, l, o, &c); err != nil {
		return nil, err
	}
	provided, err := examineMachine(ctx, l, x, &c)
	if err != nil {
		return nil, err
	}
	if provided {
		if err := examineCPU(ctx, l, o, x, &c); err != nil {
			return nil, err
		}
	}
	d.examineMemory(o, x, &c)
	c.Add(storage.Compare(gatherFiles(x), o.Files))
	d.examineOwnership(x, &c)
	examineNVRAM(o, x, &c)
	d.examineDefinitions(o, &c)
	if err := d.examineNetworks(ctx, l, x, &c); err != nil {
		return nil, err
	}
	if err := examineSecurity(ctx, l, o, x, &c); err != nil {
		return nil, err
	}
	return c, d.examineNames(ctx, l, x, &c)
}

// examineVersions compares the daemons and the page size.
func examineVersions(ctx context.Context, l *link, o *offer, c *hypervisor.Checks) error {
	qemu, err := call(ctx, l, func(l *link) (uint64, error) { return l.ConnectGetVersion() })
	if err != nil {
		return err
	}
	lib, err := call(ctx, l, func(l *link) (uint64, error) { return l.ConnectGetLibVersion() })
	if err != nil {
		return err
	}
	if lib < o.Libvirt {
		c.Warn("libvirt", fmt.Sprintf("%s here is older than the source's %s", VersionWords(lib), VersionWords(o.Libvirt)), "upgrade it, should it not understand the domain")
	} else {
		c.Pass("libvirt", "%s, %s at the source", VersionWords(lib), VersionWords(o.Libvirt))
	}
	if qemu < o.QEMU {
		c.Fail("QEMU", fmt.Sprintf("QEMU %s here is older than the source's %s", VersionWords(qemu), VersionWords(o.QEMU)), "upgrade it")
	} else {
		c.Pass("QEMU", "%s, %s at the source", VersionWords(qemu), VersionWords(o.QEMU))
	}
	if here := os.Getpagesize(); here != o.PageSize {
		c.Fail("page size", fmt.Sprintf("pages have %d bytes here and %d at the source", here, o.PageSize), "both hosts need the same")
	}
	return nil
}

// examineMachine asks whether the domain's QEMU is here and has its machine type
// and accelerator.
func examineMachine(ctx context.Context, l *link, x *libvirtxml.Domain, c *hypervisor.Checks) (ok bool, err error) {
	emulator, arch, machine := platform(x)
	if emulator != "" {
		if _, err := os.Stat(emulator); err != nil {
			c.Fail("emulator", fmt.Sprintf("%s: %v", emulator, errors.Unwrap(err)), "install the source's QEMU under this path")
			return false, nil
		}
	}
	caps, err := domainCapabilities(ctx, l, x)
	var refused lv.Error
	switch {
	case errors.As(err, &refused):
		c.Fail("machine type", fmt.Sprintf("libvirt cannot run %s for %s of type %s here: %s", machine, arch, x.Type, refused.Message), "install the source's QEMU or a later one, and load the kvm module if the guest needs it")
		return false, nil
	case err != nil:
		return false, err
	}
	c.Pass("machine type", "%s, run by %s with %s", machine, emulator, accelerator(x.Type))
	examineEmulatedTPM(caps, x, c)
	return true, nil
}

// examineEmulatedTPM asks whether libvirt has what emulates a TPM, if the domain
// has one.
func examineEmulatedTPM(caps *libvirtxml.DomainCaps, x *libvirtxml.Domain, c *hypervisor.Checks) {
	if x.Devices == nil || !slices.ContainsFunc(x.Devices.TPMs, func(t libvirtxml.DomainTPM) bool { return t.Backend != nil && t.Backend.Emulator != nil }) {
		return
	}
	if caps.Devices != nil && caps.Devices.TPM != nil {
		for _, e := range caps.Devices.TPM.Enums {
			if e.Name == "backendModel" && slices.Contains(e.Values, "emulator") {
				c.Pass("TPM", "libvirt can emulate it")
				return
			}
		}
	}
	c.Fail("TPM", "libvirt cannot emulate a TPM on this host", "install swtpm and swtpm-tools")
}

// platform is what runs a domain.
func platform(x *libvirtxml.Domain) (emulator, arch, machine string) {
	if x.Devices != nil {
		emulator = x.Devices.Emulator
	}
	if x.OS != nil && x.OS.Type != nil {
		arch, machine = x.OS.Type.Arch, x.OS.Type.Machine
	}
	return emulator, arch, machine
}

// optional is a string as libvirt's calls take one that may be absent.
func optional(s string) lv.OptString {
	if s == "" {
		return nil
	}
	return lv.OptString{s}
}

// domainCapabilities are those of the QEMU that a domain wants.
func domainCapabilities(ctx context.Context, l *link, x *libvirtxml.Domain) (*libvirtxml.DomainCaps, error) {
	emulator, arch, machine := platform(x)
	text, err := call(ctx, l, func(l *link) (string, error) {
		return l.ConnectGetDomainCapabilities(optional(emulator), optional(arch), optional(machine), optional(x.Type), 0)
	})
	if err != nil {
		return nil, err
	}
	var caps libvirtxml.DomainCaps
	if err := caps.Unmarshal(text); err != nil {
		return nil, fmt.Errorf("libvirt's domain capabilities: %w", err)
	}
	return &caps, nil
}

// examineMemory compares the domain's memory with what this host has. Its holes
// may never be filled, but nobody can tell now.
func (d *Driver) examineMemory(o *offer, x *libvirtxml.Domain, c *hypervisor.Checks) {
	f, err := parseFacts(o.XML)
	if err != nil {
		c.Err("memory", err)
		return
	}
	_, available, err := sys.Memory()
	if err != nil {
		c.Err("memory", err)
		return
	}
	words := func(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }
	if spare := available - d.cfg.MemoryReserve; spare >= f.memory {
		c.Pass("memory", "%s needed, %s available beyond the reserve", words(f.memory), words(spare))
	} else {
		c.Fail("memory", fmt.Sprintf("this host has %s of memory available, of which %s stay in reserve, and the guest needs %s",
			words(available), words(d.cfg.MemoryReserve), words(f.memory)), "free some, or choose another host")
	}
	if b := x.MemoryBacking; b == nil || b.MemorySource == nil || b.MemorySource.Type != "file" {
		return
	}
	conf, err := readQEMUConf(d.cfg.QEMUConf)
	if err != nil {
		c.Warn("memory folder", err.Error(), "see that memory_backing_dir in it has room for the guest's memory")
		return
	}
	dir, st, err := statfsUp(conf.memoryBackingDir)
	if err != nil {
		c.Err("memory folder", err)
		return
	}
	switch free := int64(st.Bavail) * st.Bsize; {
	case st.Blocks == 0: // a tmpfs without a limit
		c.Pass("memory folder", "%s has no limit", dir)
	case free < f.memory:
		c.Fail("memory folder", fmt.Sprintf("%s has room for %s, the guest needs %s", dir, words(free), words(f.memory)), "make it larger, or set memory_backing_dir in "+d.cfg.QEMUConf)
	case uint32(st.Type) != unix.TMPFS_MAGIC:
		c.Warn("memory folder", fmt.Sprintf("%s has room for %s, but is no tmpfs", dir, words(free)), `the guest's memory is written to a disk: set memory_backing_dir = "/dev/shm" in `+d.cfg.QEMUConf)
	default:
		c.Pass("memory folder", "%s has room for %s", dir, words(free))
	}
}

// statfsUp is statfs of a folder, or of the first above it that is there:
// libvirt makes the rest.
func statfsUp(dir string) (string, *unix.Statfs_t, error) {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		if err == nil {
			return dir, &st, nil
		}
		up := filepath.Dir(dir)
		if !errors.Is(err, unix.ENOENT) || up == dir {
			return dir, nil, &os.PathError{Op: "statfs", Path: dir, Err: err}
		}
		dir = up
	}
}

// securityModels are what confines domains on a host, beside their user.
func securityModels(caps *libvirtxml.Caps) []string {
	models := []string{}
	for _, m := range caps.Host.SecModel {
		if m.Name != "dac" && m.Name != "none" {
			models = append(models, m.Name)
		}
	}
	return models
}

// examineSecurity compares what confines the domain on both hosts.
func examineSecurity(ctx context.Context, l *link, o *offer, x *libvirtxml.Domain, c *hypervisor.Checks) error {
	caps, err := capabilities(ctx, l)
	if err != nil {
		return err
	}
	compareSecurity(securityModels(caps), o, x, c)
	return nil
}

func compareSecurity(here []string, o *offer, x *libvirtxml.Domain, c *hypervisor.Checks) {
	const advice = "set security_driver in /etc/libvirt/qemu.conf as at the source"
	found := len(*c)
	for i := range x.SecLabel {
		if m := x.SecLabel[i].Model; m != "" && m != "dac" && m != "none" && !slices.Contains(here, m) {
			c.Fail("security", fmt.Sprintf("the guest has a label of %s, which libvirt does not use on this host", m), advice)
		}
	}
	for _, m := range o.Security {
		if !slices.Contains(here, m) && len(*c) == found {
			c.Warn("security", fmt.Sprintf("%s confines the guest at the source, and would not on this host", m), advice)
		}
	}
	if len(*c) > found {
		return
	}
	if len(here) == 0 {
		c.Pass("security", "no security model but users, as at the source")
		return
	}
	c.Pass("security", "%s", strings.Join(here, ", "))
}

// examineNames looks for what has the domain's name or UUID here.
func (d *Driver) examineNames(ctx context.Context, l *link, x *libvirtxml.Domain, c *hypervisor.Checks) error {
	doms, err := call(ctx, l, func(l *link) ([]lv.Domain, error) {
		doms, _, err := l.ConnectListAllDomains(1, 0)
		return doms, err
	})
	if err != nil {
		return err
	}
	found := len(*c)
	for _, dom := range doms {
		g := d.of(dom)
		switch {
		case g.name == x.Name && g.uuid == x.UUID && g.info().State == hypervisor.StateStopped:
			c.Fail("name", "this guest is defined on this host already, as after a virsh migrate without --undefinesource, and could be started here too", "remove that: virsh undefine --keep-nvram "+g.name)
		case g.name == x.Name:
			c.Fail("name", fmt.Sprintf("there is already a guest named %s on this host (%s, %s)", g.name, g.uuid, g.info().State), "remove or rename one of them")
		case g.uuid == x.UUID:
			c.Fail("UUID", fmt.Sprintf("guest %s of this host has the same UUID %s", g.name, g.uuid), "remove one of them")
		}
	}
	if len(*c) == found {
		c.Pass("name and UUID", "free")
	}
	return nil
}
