package lab

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// switchBridge is the bridge in the switch's namespace.
const switchBridge = "sw0"

// uplink is what a node calls its link to the switch.
const uplink = "uplink"

// makeNetwork makes all namespaces and what connects them.
func (l *Lab) makeNetwork() error {
	for _, node := range append([]string{switchNode}, l.Nodes()...) {
		name := l.namespace(node)
		if err := makeNamespace(name); err != nil {
			return err
		}
		if err := inNamespace(name, quiet); err != nil {
			return err
		}
	}
	if err := l.with(switchNode, func(h *netlink.Handle) error { return makeBridge(h, switchBridge, nil) }); err != nil {
		return err
	}
	for _, node := range l.Nodes() {
		if err := l.connect(node); err != nil {
			return err
		}
	}
	return nil
}

// quiet settles, for all links to be made in this thread's namespace, that IPv6
// addresses work at once and that nothing is learnt from routers.
func quiet() error {
	for _, dir := range []string{"all", "default"} {
		for _, key := range []string{"accept_dad", "accept_ra"} {
			path := filepath.Join("/proc/sys/net/ipv6/conf", dir, key)
			if err := os.WriteFile(path, []byte("0"), 0); err != nil {
				return fmt.Errorf("lab: %w", err)
			}
		}
	}
	return nil
}

// with runs f with a handle on a node's network.
func (l *Lab) with(node string, f func(*netlink.Handle) error) error {
	ns, err := netns.GetFromName(l.namespace(node))
	if err != nil {
		return fmt.Errorf("lab: namespace of %s: %w", node, err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return fmt.Errorf("lab: network of %s: %w", node, err)
	}
	defer h.Close()
	if err := f(h); err != nil {
		return fmt.Errorf("lab: network of %s: %w", node, err)
	}
	return nil
}

// connect links a node to the switch. A host's addresses are its bridge's, the
// client's those of its link.
func (l *Lab) connect(node string) error {
	ns, err := netns.GetFromName(l.namespace(node))
	if err != nil {
		return fmt.Errorf("lab: namespace of %s: %w", node, err)
	}
	defer ns.Close()
	// The far end is born in the node's namespace: no name clashes on the way.
	err = l.with(switchNode, func(h *netlink.Handle) error {
		veth := &netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: node},
			PeerName:  uplink, PeerNamespace: netlink.NsFd(ns), PeerHardwareAddr: hardwareAddress(node),
		}
		if err := h.LinkAdd(veth); err != nil {
			return fmt.Errorf("link to %s: %w", node, err)
		}
		return enslave(h, node, switchBridge)
	})
	if err != nil {
		return err
	}
	return l.with(node, func(h *netlink.Handle) error {
		if err := setUp(h, "lo"); err != nil {
			return err
		}
		if node == Client {
			return configure(h, uplink, addresses(clientNumber))
		}
		if err := makeBridge(h, Bridge, addresses(hostNumber(node))); err != nil {
			return err
		}
		return enslave(h, uplink, Bridge)
	})
}

// hardwareAddress is that of a node's uplink. As a real one's it is below those of
// taps, which libvirt makes fe:…: a bridge has the lowest address of its ports, and
// one that a random address put above would change its own with the guests that
// come and go, and not be heard until its neighbours have asked for it again.
func hardwareAddress(node string) net.HardwareAddr {
	number := clientNumber
	if node != Client {
		number = hostNumber(node)
	}
	return net.HardwareAddr{0x02, 0x4c, 0x4d, 0, 0, byte(number)}
}

func makeBridge(h *netlink.Handle, name string, addrs []netip.Prefix) error {
	// Hosts that multicast nothing but neighbour discovery need no snooping,
	// which drops some of it before a querier is known.
	snooping := false
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}, MulticastSnooping: &snooping}
	if err := h.LinkAdd(bridge); err != nil {
		return fmt.Errorf("bridge %s: %w", name, err)
	}
	return configure(h, name, addrs)
}

func configure(h *netlink.Handle, name string, addrs []netip.Prefix) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for _, a := range addrs {
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}}
		if err := h.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("%s: address %s: %w", name, a, err)
		}
	}
	return setUp(h, name)
}

func enslave(h *netlink.Handle, name, bridge string) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	master, err := h.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("%s: %w", bridge, err)
	}
	if err := h.LinkSetMaster(link, master); err != nil {
		return fmt.Errorf("%s: onto %s: %w", name, bridge, err)
	}
	return setUp(h, name)
}

func setUp(h *netlink.Handle, name string) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

// Cut takes a node off the switch: its link goes down at the switch's end, as
// if the cable were pulled.
func (l *Lab) Cut(node string) error { return l.plug(node, (*netlink.Handle).LinkSetDown) }

// Heal undoes Cut.
func (l *Lab) Heal(node string) error { return l.plug(node, (*netlink.Handle).LinkSetUp) }

func (l *Lab) plug(node string, set func(*netlink.Handle, netlink.Link) error) error {
	return l.with(switchNode, func(h *netlink.Handle) error {
		link, err := h.LinkByName(node)
		if err != nil {
			return fmt.Errorf("no such node: %q: %w", node, err)
		}
		return set(h, link)
	})
}

// Traffic returns the bytes that a host has sent to and received from the
// switch since the lab is up.
func (l *Lab) Traffic(node string) (sent, received uint64, err error) {
	err = l.with(switchNode, func(h *netlink.Handle) error {
		link, err := h.LinkByName(node)
		if err != nil {
			return fmt.Errorf("no such node: %q: %w", node, err)
		}
		s := link.Attrs().Statistics
		sent, received = s.RxBytes, s.TxBytes // the switch receives what the host sends
		return nil
	})
	return sent, received, err
}
