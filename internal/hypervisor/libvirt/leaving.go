package libvirt

import (
	"context"
	"fmt"

	"github.com/dustin/go-humanize"
	"libvirt.org/go/libvirtxml"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// Examine says what speaks for and against moving this domain away.
func (s *Guest) Examine(ctx context.Context) (*hypervisor.Examination, error) {
	l, err := s.g.d.conn.get()
	if err != nil {
		return nil, fmt.Errorf("look at guest %s: %w", s.g.name, err)
	}
	if err := s.g.look(ctx, l); err != nil {
		return nil, fmt.Errorf("look at guest %s: %w", s.g.name, err)
	}
	var e hypervisor.Examination
	if i := s.g.info(); i.State == hypervisor.StateRunning {
		e.Any.Pass("state", "%s", i.State)
	} else {
		e.Any.Fail("state", fmt.Sprintf("the guest is not running (%s)", i.Runstate), "let it go on first")
	}
	if err := s.g.examineLibvirt(ctx, l, &e.Any); err != nil {
		return nil, fmt.Errorf("look at guest %s: %w", s.g.name, err)
	}
	s.g.mu.Lock()
	x := s.g.facts.xml
	s.g.mu.Unlock()
	if x != nil {
		examineTPM(x, &e.Any)
		examineDisks(x, &e.Any)
		s.g.d.examineOwnership(x, &e.Any)
	}
	s.examineDirect(x, &e.Direct)
	if reasons := relayReasons(x); len(reasons) > 0 {
		e.Relay.Refuse("relay", reasons...)
	} else {
		e.Relay.Pass("relay", "QEMU can copy the memory itself")
	}
	return &e, nil
}

// examineDirect looks for what only keeps a domain from being moved directly.
func (s *Guest) examineDirect(x *libvirtxml.Domain, c *hypervisor.Checks) {
	if reasons := deviceReasons(x); len(reasons) > 0 {
		c.Refuse("device", reasons...)
	} else {
		c.Pass("devices", "none writes the guest's memory from outside of QEMU")
	}
	if reasons := s.memoryReasons(); len(reasons) > 0 {
		c.Refuse("memory backing", reasons...)
		return
	}
	var size int64
	for _, b := range s.blocks {
		size += b.Size
	}
	c.Pass("memory backing", "%s in shared files (%d)", humanize.IBytes(uint64(size)), len(s.blocks))
}

// examineLibvirt says what libvirt or QEMU have against it.
func (g *domain) examineLibvirt(ctx context.Context, l *link, c *hypervisor.Checks) error {
	n, err := call(ctx, l, func(l *link) (int32, error) { return l.DomainSnapshotNum(g.ref(), 0) })
	if err != nil {
		return err
	}
	saved, err := call(ctx, l, func(l *link) (int32, error) { return l.DomainHasManagedSaveImage(g.ref(), 0) })
	if err != nil {
		return err
	}
	if n > 0 {
		c.Fail("snapshots", fmt.Sprintf("it has %d snapshots, of which the destination would know nothing", n), "delete them first (virsh snapshot-delete)")
	}
	if saved != 0 {
		c.Fail("managed save", "it has a managed save image, which would stay behind", "remove it first (virsh managedsave-remove)")
	}
	if n == 0 && saved == 0 {
		c.Pass("snapshots", "none, nor a managed save image")
	}
	var status struct {
		Status  string   `json:"status"`
		Blocked []string `json:"blocked-reasons"`
	}
	if err := g.monitor(ctx, l, "query-migrate", nil, &status); err != nil {
		return err
	}
	for _, b := range status.Blocked {
		c.Fail("QEMU", "QEMU cannot migrate this guest: "+b, "")
	}
	if len(status.Blocked) == 0 {
		c.Pass("QEMU", "it has nothing against a migration")
	}
	return nil
}

// examineTPM refuses a TPM of this host. An emulated one moves: QEMU's stream has
// what its process, swtpm, keeps, and libvirt sees to that process and its folder
// on both hosts.
func examineTPM(x *libvirtxml.Domain, c *hypervisor.Checks) {
	if x.Devices == nil {
		return
	}
	for i := range x.Devices.TPMs {
		b := x.Devices.TPMs[i].Backend
		switch {
		case b == nil:
		case b.Emulator == nil:
			c.Refuse("TPM", "the TPM cannot be moved: it is a device or a process of this host; detach it first")
		default:
			folder := folderOfTPM(x, b.Emulator)
			if on, err := fileSystem(folder); err == nil && on.shared {
				c.Warn("TPM", fmt.Sprintf("emulated, its state is in %s, on %s; that such a folder is shared is not tested", folder, on.name), "keep the folder on each host's own disk")
				continue
			}
			c.Pass("TPM", "emulated, its state goes with QEMU's")
		}
	}
}

// folderOfTPM is where libvirt keeps the state of a domain's emulated TPM.
func folderOfTPM(x *libvirtxml.Domain, e *libvirtxml.DomainTPMBackendEmulator) string {
	if s := e.Source; s != nil && s.Dir != nil {
		return s.Dir.Path
	}
	return "/var/lib/libvirt/swtpm/" + x.UUID
}
