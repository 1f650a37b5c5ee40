package announce

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ethernet"
	"github.com/mdlayher/ndp"
)

const (
	etherTypeRARP = 0x8035

	arpReverseRequest = arp.Operation(3) // RFC 903

	protocolUDP    = 17
	protocolICMPv6 = 58
)

var (
	noMAC       = net.HardwareAddr{0, 0, 0, 0, 0, 0}
	allNodes    = netip.MustParseAddr("ff02::1")
	allNodesMAC = net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1} // RFC 2464, section 7
	unspecified = netip.IPv4Unspecified()
)

// frame is an Ethernet frame that is yet to get its VLAN tag.
type frame struct {
	to, from net.HardwareAddr
	kind     ethernet.EtherType
	payload  []byte
}

// bytes puts the frame together; vlan 0 means no tag.
func (f frame) bytes(vlan uint16) ([]byte, error) {
	e := ethernet.Frame{Destination: f.to, Source: f.from, EtherType: f.kind, Payload: f.payload}
	if vlan != 0 {
		e.VLAN = &ethernet.VLAN{ID: vlan}
	}
	return e.MarshalBinary()
}

// framesFor builds what announces one address: for IPv4 a gratuitous ARP as a
// request (the announcement of RFC 5227) and as a reply, for there are stacks
// that take only the one or the other; for IPv6 an unsolicited neighbour
// advertisement.
func framesFor(nic NIC, addr netip.Addr) ([]frame, error) {
	addr = addr.Unmap().WithZone("")
	if !usable(addr) {
		return nil, fmt.Errorf("%s is not the address of one host", addr)
	}
	if addr.Is6() {
		f, err := advertisement(nic, addr)
		return []frame{f}, err
	}
	request, err := arpFrame(nic.MAC, arp.OperationRequest, addr, noMAC)
	if err != nil {
		return nil, err
	}
	// Linux takes a reply as gratuitous only if the target hardware address is
	// the sender's (arp_is_garp in net/ipv4/arp.c).
	reply, err := arpFrame(nic.MAC, arp.OperationReply, addr, nic.MAC)
	return []frame{request, reply}, err
}

// reverseRequest is a frame that says nothing but the MAC, for the switches:
// the RARP request that QEMU's announce-self sends too.
func reverseRequest(nic NIC) (frame, error) {
	f, err := arpFrame(nic.MAC, arpReverseRequest, unspecified, nic.MAC)
	f.kind = etherTypeRARP
	return f, err
}

func arpFrame(mac net.HardwareAddr, op arp.Operation, addr netip.Addr, target net.HardwareAddr) (frame, error) {
	p, err := arp.NewPacket(op, mac, addr, target, addr)
	if err != nil {
		return frame{}, fmt.Errorf("build ARP for %s: %w", addr, err)
	}
	b, err := p.MarshalBinary()
	if err != nil {
		return frame{}, fmt.Errorf("build ARP for %s: %w", addr, err)
	}
	return frame{to: ethernet.Broadcast, from: mac, kind: ethernet.EtherTypeARP, payload: b}, nil
}

func advertisement(nic NIC, addr netip.Addr) (frame, error) {
	message := &ndp.NeighborAdvertisement{
		Router:        nic.Router,
		Override:      true,
		TargetAddress: addr,
		Options:       []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Target, Addr: nic.MAC}},
	}
	icmp, err := ndp.MarshalMessageChecksum(message, addr, allNodes)
	if err != nil {
		return frame{}, fmt.Errorf("build neighbour advertisement for %s: %w", addr, err)
	}
	b := make([]byte, 40, 40+len(icmp)) // the IPv6 header, RFC 8200, section 3
	b[0] = 6 << 4
	binary.BigEndian.PutUint16(b[4:], uint16(len(icmp)))
	b[6] = protocolICMPv6
	b[7] = 255 // a receiver takes no other, RFC 4861, section 7.1.2
	copy(b[8:], addr.AsSlice())
	copy(b[24:], allNodes.AsSlice())
	return frame{to: allNodesMAC, from: nic.MAC, kind: ethernet.EtherTypeIPv6, payload: append(b, icmp...)}, nil
}

// usable says whether addr can be the address of one host on a network.
func usable(addr netip.Addr) bool {
	if !addr.IsValid() || addr.IsUnspecified() || addr.IsMulticast() || addr.IsLoopback() {
		return false
	}
	if addr.Is4() {
		b := addr.As4()
		return b[0] != 0 && b[0] < 240 // 0/8 is no host's; 240/4 is reserved
	}
	return !addr.Is4In6()
}
