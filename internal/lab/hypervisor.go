package lab

import (
	"fmt"
	"os/user"
	"strings"
)

// Hypervisor is what runs the guests of a lab's hosts.
type Hypervisor string

// The hypervisors.
const (
	QEMU    Hypervisor = "qemu"    // the agents start QEMU themselves
	Libvirt Hypervisor = "libvirt" // each host has a libvirtd, whose domains the agent takes over
)

// LibvirtOptions say how the libvirtd's of a lab run QEMU. The zero value is
// QEMU as root with libvirt's sandbox, its output in a file.
type LibvirtOptions struct {
	// User and Group are QEMU's; root if empty. With another user /dev/kvm is
	// made to belong to the group kvm on the hosts, as udev would.
	User  string `json:"user,omitempty"`
	Group string `json:"group,omitempty"`
	// DynamicOwnership has libvirt give disks to QEMU's user, and back.
	DynamicOwnership bool `json:"dynamic_ownership,omitempty"`
	NoSandbox        bool `json:"no_sandbox,omitempty"`
	// Virtlogd starts a virtlogd beside each libvirtd, which then carries what
	// QEMU and its guests' serial ports write, as distributions have it.
	Virtlogd bool `json:"virtlogd,omitempty"`
	// QEMUConf and LibvirtdConf are lines that are added to each host's
	// qemu.conf and libvirtd.conf.
	QEMUConf     []string `json:"qemu_conf,omitempty"`
	LibvirtdConf []string `json:"libvirtd_conf,omitempty"`
	// Installations are by host; a host without one uses the machine's.
	Installations map[string]Installation `json:"installations,omitempty"`
}

// Hypervisor is what runs the guests of this lab.
func (l *Lab) Hypervisor() Hypervisor { return l.state.hypervisor() }

// hypervisor is QEMU in the state of a lab that was made before there was a
// choice.
func (s *state) hypervisor() Hypervisor {
	if s.Hypervisor == "" {
		return QEMU
	}
	return s.Hypervisor
}

// seenByHosts is about a lab's folder that its own hosts would not see, since
// they have something else in its place.
func seenByHosts(dir string) error {
	for _, hidden := range []string{"/run", "/var/run", "/sys", "/dev/shm", "/etc/libvirt", "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt"} {
		if dir == hidden || strings.HasPrefix(dir, hidden+"/") {
			return fmt.Errorf("lab: %s: a host with libvirt has a %s of its own: choose another folder", dir, hidden)
		}
	}
	return nil
}

// settleHypervisor checks what is asked for a lab in a folder, and completes it.
func (s *state) settleHypervisor(dir string) error {
	switch s.hypervisor() {
	case QEMU:
		s.Libvirt = nil
		return nil
	case Libvirt:
	default:
		return fmt.Errorf("lab: no such hypervisor: %q: there are %s and %s", s.Hypervisor, QEMU, Libvirt)
	}
	if err := seenByHosts(dir); err != nil {
		return err
	}
	o := s.Libvirt
	if o.User == "" {
		o.User = "root"
	}
	u, err := user.Lookup(o.User)
	if err != nil {
		return fmt.Errorf("lab: QEMU's user: %w", err)
	}
	if o.Group == "" {
		g, err := user.LookupGroupId(u.Gid)
		if err != nil {
			return fmt.Errorf("lab: QEMU's group: %w", err)
		}
		o.Group = g.Name
	} else if _, err := user.LookupGroup(o.Group); err != nil {
		return fmt.Errorf("lab: QEMU's group: %w", err)
	}
	for host, in := range o.Installations {
		if i := hostNumber(host); i < 1 || i > s.Hosts {
			return fmt.Errorf("lab: an installation of libvirt for %q, which is no host", host)
		}
		if err := in.check(host); err != nil {
			return err
		}
	}
	for _, line := range append(append([]string{}, o.QEMUConf...), o.LibvirtdConf...) {
		if strings.ContainsAny(line, "\n\x00") {
			return fmt.Errorf("lab: a line of libvirt's configuration that is none: %q", line)
		}
	}
	return nil
}

// hasMounts says whether a node has a mount namespace of its own.
func (l *Lab) hasMounts(node string) bool {
	return l.Hypervisor() == Libvirt && hostNumber(node) > 0
}
