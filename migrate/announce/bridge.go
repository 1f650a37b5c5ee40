package announce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// NIC is one network card of a guest and where it is plugged in on this host.
type NIC struct {
	Bridge string           // the Linux bridge
	Tap    string           // the tap, a port of Bridge
	MAC    net.HardwareAddr // the guest's, 6 bytes, unicast
	// Addresses are the guest's on this card, IPv4 and IPv6. May be empty.
	Addresses []netip.Addr
	// Router says that the guest is an IPv6 router. An advertisement that left
	// this out would make its neighbours drop their routes through it
	// (RFC 4861, section 7.2.5).
	Router bool
}

// String names the card in errors: its tap and its MAC.
func (n NIC) String() string { return fmt.Sprintf("NIC %s on %s", n.MAC, n.Tap) }

func (n NIC) check() error {
	switch {
	case len(n.MAC) != 6:
		return fmt.Errorf("MAC has %d bytes, not 6", len(n.MAC))
	case n.MAC[0]&1 != 0:
		return fmt.Errorf("MAC %s is a group address", n.MAC)
	case n.Bridge == "" || n.Tap == "":
		return errors.New("needs a bridge and a tap")
	}
	return nil
}

// Redirect points the bridge's forwarding entry for the guest's MAC to its
// tap, in place of an entry learnt while the guest was elsewhere, which would
// send its frames back out of the uplink until the guest itself says something.
// The tap must be up and a port of the bridge. The entry is a dynamic one: it
// ages, and follows the guest when it moves on.
func Redirect(nic NIC) error {
	if err := nic.check(); err != nil {
		return fmt.Errorf("announce: redirect %s: %w", nic, err)
	}
	if err := redirect(nic); err != nil {
		return fmt.Errorf("announce: redirect %s: %w", nic, err)
	}
	return nil
}

func redirect(nic NIC) error {
	bridge, err := bridgeLink(nic.Bridge)
	if err != nil {
		return err
	}
	tap, err := netlink.LinkByName(nic.Tap)
	if err != nil {
		return fmt.Errorf("find %s: %w", nic.Tap, err)
	}
	attrs := tap.Attrs()
	if attrs.MasterIndex != bridge.Attrs().Index {
		return fmt.Errorf("%s is not a port of %s", nic.Tap, nic.Bridge)
	}
	if attrs.Flags&net.FlagUp == 0 {
		return fmt.Errorf("%s is down", nic.Tap)
	}
	entry := &netlink.Neigh{
		LinkIndex:    attrs.Index,
		Family:       unix.AF_BRIDGE,
		Flags:        netlink.NTF_MASTER,
		State:        netlink.NUD_REACHABLE,
		HardwareAddr: nic.MAC,
	}
	err = netlink.NeighSet(entry)
	if errors.Is(err, unix.EPERM) {
		// The bridge takes no dynamic entry for a port that does not forward
		// yet, which it may not in the moment after the tap came up. It takes
		// a static one, which moves just the same and goes with the port; the
		// next Redirect (Begin does one) makes it dynamic.
		entry.State = netlink.NUD_NOARP
		err = netlink.NeighSet(entry)
	}
	if err != nil {
		return fmt.Errorf("set entry on %s: %w", nic.Bridge, err)
	}
	return nil
}

func bridgeLink(name string) (*netlink.Bridge, error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find bridge %s: %w", name, err)
	}
	bridge, ok := link.(*netlink.Bridge)
	if !ok {
		return nil, fmt.Errorf("%s is a %s, not a Linux bridge", name, link.Type())
	}
	return bridge, nil
}

// port is a bridge's port as RTM_GETLINK of AF_BRIDGE describes it.
type port struct {
	index    int
	master   int
	up       bool
	state    uint8 // BR_STATE_*, linux/if_bridge.h
	unicast  bool  // unknown unicast is flooded to it
	isolated bool
	pvid     uint16            // 0 for none
	vlans    map[uint16]uint16 // VLAN id to BRIDGE_VLAN_INFO_* flags
}

const stateForwarding = 3 // BR_STATE_FORWARDING

// bridgePorts lists the ports of every bridge in this network namespace, by
// interface index.
func bridgePorts() (map[int]port, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
	req.AddData(nl.NewIfInfomsg(unix.AF_BRIDGE))
	req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(nl.RTEXT_FILTER_BRVLAN)))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return nil, fmt.Errorf("list bridge ports: %w", err)
	}
	ports := make(map[int]port, len(msgs))
	for _, m := range msgs {
		p, err := parsePort(m)
		if err != nil {
			return nil, fmt.Errorf("list bridge ports: %w", err)
		}
		ports[p.index] = p
	}
	return ports, nil
}

func parsePort(m []byte) (port, error) {
	if len(m) < unix.SizeofIfInfomsg {
		return port{}, fmt.Errorf("message of %d bytes", len(m))
	}
	info := nl.DeserializeIfInfomsg(m)
	p := port{
		index: int(info.Index),
		up:    info.Flags&unix.IFF_UP != 0,
		vlans: make(map[uint16]uint16),
	}
	attrs, err := nl.ParseRouteAttr(m[unix.SizeofIfInfomsg:])
	if err != nil {
		return port{}, err
	}
	for _, a := range attrs {
		switch a.Attr.Type &^ unix.NLA_F_NESTED {
		case unix.IFLA_MASTER:
			if len(a.Value) >= 4 {
				p.master = int(binary.NativeEndian.Uint32(a.Value))
			}
		case unix.IFLA_PROTINFO:
			err = p.parseFlags(a.Value)
		case unix.IFLA_AF_SPEC:
			err = p.parseVLANs(a.Value)
		}
		if err != nil {
			return port{}, err
		}
	}
	return p, nil
}

func (p *port) parseFlags(b []byte) error {
	attrs, err := nl.ParseRouteAttr(b)
	if err != nil {
		return err
	}
	for _, a := range attrs {
		if len(a.Value) == 0 {
			continue
		}
		switch a.Attr.Type {
		case nl.IFLA_BRPORT_STATE:
			p.state = a.Value[0]
		case nl.IFLA_BRPORT_UNICAST_FLOOD:
			p.unicast = a.Value[0] != 0
		case nl.IFLA_BRPORT_ISOLATED:
			p.isolated = a.Value[0] != 0
		}
	}
	return nil
}

func (p *port) parseVLANs(b []byte) error {
	attrs, err := nl.ParseRouteAttr(b)
	if err != nil {
		return err
	}
	for _, a := range attrs {
		if a.Attr.Type != nl.IFLA_BRIDGE_VLAN_INFO || len(a.Value) < nl.SizeofBridgeVlanInfo {
			continue
		}
		flags, vid := binary.NativeEndian.Uint16(a.Value), binary.NativeEndian.Uint16(a.Value[2:])
		p.vlans[vid] = flags
		if flags&nl.BRIDGE_VLAN_INFO_PVID != 0 {
			p.pvid = vid
		}
	}
	return nil
}

// way is a way out of a bridge: a port, and the 802.1Q tag that an untagged
// frame of the tap has there, 0 for none.
type way struct {
	index int
	vlan  uint16
}

// waysOut lists where the bridge would send a frame that came from the tap and
// that it has to flood. Frames are put straight onto these ports and not onto
// the bridge device, for three reasons: the guest must not receive its own
// announcements back (it would log them as an address conflict, or as its
// bridge's own address), a frame that is sent on must not end in the tap that
// it came out of, and the bridge device itself need not be a member of the
// tap's VLAN. With uplinksOnly, ports that are taps, which lead to other guests
// of this host, and ports to which unknown unicast is not flooded are left out.
func waysOut(nic NIC, uplinksOnly bool) ([]way, error) {
	bridge, err := bridgeLink(nic.Bridge)
	if err != nil {
		return nil, err
	}
	tap, err := netlink.LinkByName(nic.Tap)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", nic.Tap, err)
	}
	ports, err := bridgePorts()
	if err != nil {
		return nil, err
	}
	taps := make(map[int]bool)
	if uplinksOnly {
		if taps, err = tapIndexes(); err != nil {
			return nil, err
		}
	}
	from := ports[tap.Attrs().Index]
	if from.master != bridge.Attrs().Index {
		return nil, fmt.Errorf("%s is not a port of %s", nic.Tap, nic.Bridge)
	}
	filtering := bridge.VlanFiltering != nil && *bridge.VlanFiltering
	if filtering && from.pvid == 0 {
		return nil, fmt.Errorf("%s filters VLANs and %s has no PVID, so that an untagged frame goes nowhere", nic.Bridge, nic.Tap)
	}
	var ways []way
	for _, p := range ports {
		if uplinksOnly && (taps[p.index] || !p.unicast) {
			continue
		}
		if vlan, ok := p.takes(from, filtering); ok {
			ways = append(ways, way{index: p.index, vlan: vlan})
		}
	}
	slices.SortFunc(ways, func(a, b way) int { return a.index - b.index })
	return ways, nil
}

// takes says whether the bridge floods an untagged frame that came from one
// port to p, and with what tag it leaves there, 0 for none.
func (p port) takes(from port, filtering bool) (vlan uint16, ok bool) {
	switch {
	case p.index == from.index, p.master != from.master, p.index == p.master:
		return 0, false
	case !p.up, p.state != stateForwarding, p.isolated && from.isolated:
		return 0, false
	case !filtering:
		return 0, true
	}
	flags, member := p.vlans[from.pvid]
	if flags&nl.BRIDGE_VLAN_INFO_UNTAGGED == 0 {
		vlan = from.pvid
	}
	return vlan, member
}

func tapIndexes() (map[int]bool, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	taps := make(map[int]bool)
	for _, l := range links {
		if _, ok := l.(*netlink.Tuntap); ok {
			taps[l.Attrs().Index] = true
		}
	}
	return taps, nil
}
