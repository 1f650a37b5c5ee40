package announce

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ethernet"
	"github.com/mdlayher/ndp"
)

// sighting is what one frame says about the guest's addresses. The zero value
// says nothing.
type sighting struct {
	uses    netip.Addr // the guest uses this address
	tries   netip.Addr // the guest is finding out whether it may use this one
	gone    netip.Addr // the guest does not use this address, or no more
	asked   bool       // the guest sent a DHCP request with this xid ...
	granted netip.Addr // ... or a server granted this address for xid
	xid     uint32
	routes  bool // the guest is an IPv6 router
}

// sight reads one frame that the tap carried, from the guest if its source is
// mac and else to the guest. Nothing in the frame is trusted.
func sight(b []byte, mac net.HardwareAddr) sighting {
	if len(b) < offIP {
		return sighting{}
	}
	own := bytes.Equal(b[offSource:offType], mac)
	switch ethernet.EtherType(binary.BigEndian.Uint16(b[offType:])) {
	case ethernet.EtherTypeARP:
		return sightARP(b[offIP:], mac, own)
	case ethernet.EtherTypeIPv4:
		return sightDHCP(b[offIP:], mac, own)
	case ethernet.EtherTypeIPv6:
		return sightND(b[offIP:], mac, own)
	}
	return sighting{}
}

// sightARP reads the sender's addresses of RFC 826. A probe's, 0.0.0.0, is
// nobody's (RFC 5227): the address that it asks about is announced later if it
// turns out to be free.
func sightARP(b []byte, mac net.HardwareAddr, own bool) sighting {
	const ethernetIPv4 = "\x00\x01\x08\x00\x06\x04" // types and lengths
	if len(b) < 28 || string(b[:6]) != ethernetIPv4 {
		return sighting{}
	}
	if op := arp.Operation(binary.BigEndian.Uint16(b[6:])); op != arp.OperationRequest && op != arp.OperationReply {
		return sighting{}
	}
	sender := netip.AddrFrom4([4]byte(b[14:18]))
	if !usable(sender) {
		return sighting{}
	}
	ofGuest := bytes.Equal(b[8:14], mac)
	switch {
	case own && ofGuest:
		return sighting{uses: sender}
	case !own && !ofGuest:
		return sighting{gone: sender}
	}
	return sighting{} // the guest speaks for another, or another for the guest
}

// sightND reads neighbour discovery (RFC 4861) without extension headers.
func sightND(b []byte, mac net.HardwareAddr, own bool) sighting {
	if len(b) < 40+4 || b[0]>>4 != 6 || b[6] != protocolICMPv6 || b[7] != 255 {
		return sighting{}
	}
	length := int(binary.BigEndian.Uint16(b[4:]))
	if length > len(b)-40 {
		return sighting{}
	}
	message, err := ndp.ParseMessage(b[40 : 40+length])
	if err != nil {
		return sighting{}
	}
	source := netip.AddrFrom16([16]byte(b[8:24]))
	switch m := message.(type) {
	case *ndp.NeighborSolicitation:
		return sightSolicitation(source, m, own)
	case *ndp.NeighborAdvertisement:
		return sightAdvertisement(m, mac, own)
	case *ndp.RouterAdvertisement:
		if own && usable(source) {
			return sighting{uses: source, routes: true}
		}
	}
	return sighting{}
}

// sightSolicitation: one without a source asks whether its target is free
// (RFC 4862, section 5.4), any other comes from an address in use.
func sightSolicitation(source netip.Addr, m *ndp.NeighborSolicitation, own bool) sighting {
	switch {
	case !own:
		return sighting{}
	case source.IsUnspecified() && usable(m.TargetAddress):
		return sighting{tries: m.TargetAddress}
	case usable(source):
		return sighting{uses: source}
	}
	return sighting{}
}

func sightAdvertisement(m *ndp.NeighborAdvertisement, mac net.HardwareAddr, own bool) sighting {
	if !usable(m.TargetAddress) {
		return sighting{}
	}
	ofGuest := own // without the option, the frame's source says whose it is
	for _, o := range m.Options {
		if l, ok := o.(*ndp.LinkLayerAddress); ok && l.Direction == ndp.Target {
			ofGuest = bytes.Equal(l.Addr, mac)
		}
	}
	switch {
	case own && ofGuest:
		return sighting{uses: m.TargetAddress, routes: m.Router}
	case !own && !ofGuest:
		return sighting{gone: m.TargetAddress}
	}
	return sighting{}
}

// DHCP message types, RFC 2132, section 9.6.
const (
	dhcpDiscover = 1
	dhcpRequest  = 3
	dhcpDecline  = 4
	dhcpACK      = 5
	dhcpRelease  = 7
	dhcpInform   = 8
)

// sightDHCP reads an IPv4 packet with a DHCP message (RFC 2131). What a guest
// requests is not yet its own: the server's ACK to the same transaction makes
// it so. Only ciaddr is an address that the client already has.
func sightDHCP(b []byte, mac net.HardwareAddr, own bool) sighting {
	if len(b) < 20 || b[0]>>4 != 4 || b[9] != protocolUDP {
		return sighting{}
	}
	header := int(b[0]&0xf) * 4
	if header < 20 || len(b) < header+8 {
		return sighting{}
	}
	port := binary.BigEndian.Uint16(b[header+2:])
	m := b[header+8:]
	const ethernet6 = "\x01\x06" // htype, hlen
	if len(m) < 240 || string(m[1:3]) != ethernet6 || string(m[236:240]) != "\x63\x82\x53\x63" {
		return sighting{}
	}
	if !bytes.Equal(m[28:34], mac) {
		return sighting{}
	}
	kind, wanted := dhcpOptions(m[240:])
	s := sighting{xid: binary.BigEndian.Uint32(m[4:])}
	switch {
	case own && m[0] == 1 && port == portDHCPServer:
		return sightClient(s, kind, wanted, address4(m[12:]))
	case !own && m[0] == 2 && port == portDHCPClient && kind == dhcpACK:
		s.granted = address4(m[16:])
		return s
	}
	return sighting{}
}

func sightClient(s sighting, kind byte, wanted, current netip.Addr) sighting {
	switch kind {
	case dhcpDiscover:
		s.asked = true // the answer may be an ACK at once, RFC 4039
	case dhcpRequest:
		s.asked = true
		s.uses = current
	case dhcpInform:
		s.uses = current
	case dhcpDecline:
		s.gone = wanted
	case dhcpRelease:
		s.gone = current
	}
	return s
}

// dhcpOptions finds the message type and the requested address.
func dhcpOptions(b []byte) (kind byte, wanted netip.Addr) {
	const pad, requested, messageType, end = 0, 50, 53, 255
	for len(b) > 0 && b[0] != end {
		if b[0] == pad {
			b = b[1:]
			continue
		}
		if len(b) < 2 || len(b) < 2+int(b[1]) {
			break
		}
		value := b[2 : 2+int(b[1])]
		switch {
		case b[0] == messageType && len(value) == 1:
			kind = value[0]
		case b[0] == requested && len(value) == 4:
			wanted = address4(value)
		}
		b = b[2+len(value):]
	}
	return kind, wanted
}

// address4 is the address in b's first four bytes, or the invalid one if no
// host can have it.
func address4(b []byte) netip.Addr {
	if a := netip.AddrFrom4([4]byte(b)); usable(a) {
		return a
	}
	return netip.Addr{}
}
