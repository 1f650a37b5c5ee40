package libvirt

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"

	lv "github.com/digitalocean/go-libvirt"
	"github.com/vishvananda/netlink"
	"libvirt.org/go/libvirtxml"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// examineNetworks looks for the bridges, networks and addresses that a domain
// needs on this host, each once.
func (d *Driver) examineNetworks(ctx context.Context, l *link, x *libvirtxml.Domain, c *hypervisor.Checks) error {
	if x.Devices == nil {
		return nil
	}
	seen := make(map[string]bool)
	first := func(name string) bool {
		was := seen[name]
		seen[name] = true
		return !was
	}
	for i := range x.Devices.Interfaces {
		switch s := x.Devices.Interfaces[i].Source; {
		case s == nil:
		case s.Bridge != nil && first("bridge "+s.Bridge.Bridge):
			d.examineBridge(s.Bridge.Bridge, c)
		case s.Network != nil && first("network "+s.Network.Network):
			if err := examineNetwork(ctx, l, s.Network.Network, c); err != nil {
				return err
			}
		}
	}
	for _, address := range listeners(x) {
		if first("address " + address) {
			if err := d.examineAddress(address, c); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *Driver) examineBridge(bridge string, c *hypervisor.Checks) {
	name := "bridge " + bridge
	link, err := d.links.LinkByName(bridge)
	var missing netlink.LinkNotFoundError
	switch {
	case errors.As(err, &missing):
		c.Fail(name, fmt.Sprintf("there is no bridge %s on this host", bridge), fmt.Sprintf("create it: ip link add %s type bridge", bridge))
	case err != nil:
		c.Err(name, fmt.Errorf("look for bridge %s: %w", bridge, err))
	case link.Attrs().Flags&net.FlagUp == 0:
		c.Warn(name, "it is down", fmt.Sprintf("ip link set %s up", bridge))
	case link.Type() != "bridge":
		c.Warn(name, fmt.Sprintf("it is a %s: the guest can come, but may not be announced on it", link.Type()), "use a bridge of the kernel's")
	default:
		c.Pass(name, "it is up")
	}
}

// examineNetwork asks for one of libvirt's networks.
func examineNetwork(ctx context.Context, l *link, network string, c *hypervisor.Checks) error {
	name := "network " + network
	active, err := call(ctx, l, func(l *link) (int32, error) {
		n, err := l.NetworkLookupByName(network)
		if err != nil {
			return 0, err
		}
		return l.NetworkIsActive(n)
	})
	switch {
	case isCode(err, lv.ErrNoNetwork):
		c.Fail(name, fmt.Sprintf("libvirt has no network %s on this host", network), "define it as at the source: virsh net-define")
	case err != nil:
		return err
	case active == 0:
		c.Fail(name, fmt.Sprintf("libvirt's network %s is not active on this host", network), "start it: virsh net-start "+network)
	default:
		c.Pass(name, "it is active")
	}
	return nil
}

// listeners are the addresses at which a domain's graphics listen, but those
// that every host has.
func listeners(x *libvirtxml.Domain) []string {
	var all []string
	for i := range x.Devices.Graphics {
		g := &x.Devices.Graphics[i]
		var list []libvirtxml.DomainGraphicListener
		switch {
		case g.VNC != nil:
			list = g.VNC.Listeners
		case g.Spice != nil:
			list = g.Spice.Listeners
		}
		for _, l := range list {
			if l.Address == nil {
				continue
			}
			if ip := net.ParseIP(l.Address.Address); ip != nil && !ip.IsUnspecified() && !ip.IsLoopback() {
				all = append(all, ip.String())
			}
		}
	}
	return all
}

func (d *Driver) examineAddress(address string, c *hypervisor.Checks) error {
	list, err := d.links.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) { // that one: others change at the same time
		return fmt.Errorf("list the host's addresses: %w", err)
	}
	if slices.ContainsFunc(list, func(a netlink.Addr) bool { return a.IP.Equal(net.ParseIP(address)) }) {
		c.Pass("graphics", "%s is here to listen at", address)
		return nil
	}
	c.Fail("graphics", fmt.Sprintf("they listen at %s, which is no address of this host", address), "have them listen at 127.0.0.1 or 0.0.0.0")
	return nil
}
