package announce

import (
	"bytes"
	"encoding/binary"
	"reflect"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The answer of a kernel that filters VLANs to RTM_GETLINK of AF_BRIDGE.
func TestParsePort(t *testing.T) {
	u8 := func(kind int, v byte) []byte { return nl.NewRtAttr(kind, []byte{v}).Serialize() }
	vlan := func(flags, vid uint16) []byte {
		b := binary.NativeEndian.AppendUint16(nil, flags)
		return nl.NewRtAttr(nl.IFLA_BRIDGE_VLAN_INFO, binary.NativeEndian.AppendUint16(b, vid)).Serialize()
	}
	info := nl.NewIfInfomsg(unix.AF_BRIDGE)
	info.Index, info.Flags = 7, unix.IFF_UP|unix.IFF_RUNNING
	m := bytes.Join([][]byte{
		info.Serialize(),
		nl.NewRtAttr(unix.IFLA_IFNAME, []byte("tap0\x00")).Serialize(),
		nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(3)).Serialize(),
		nl.NewRtAttr(unix.IFLA_PROTINFO|unix.NLA_F_NESTED, bytes.Join([][]byte{
			u8(nl.IFLA_BRPORT_STATE, stateForwarding),
			u8(nl.IFLA_BRPORT_UNICAST_FLOOD, 1),
			u8(nl.IFLA_BRPORT_ISOLATED, 1),
		}, nil)).Serialize(),
		nl.NewRtAttr(unix.IFLA_AF_SPEC, bytes.Join([][]byte{
			vlan(nl.BRIDGE_VLAN_INFO_PVID|nl.BRIDGE_VLAN_INFO_UNTAGGED, 10),
			vlan(0, 20),
		}, nil)).Serialize(),
	}, nil)
	got, err := parsePort(m)
	want := port{index: 7, master: 3, up: true, state: stateForwarding, unicast: true, isolated: true,
		pvid: 10, vlans: map[uint16]uint16{10: 6, 20: 0}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v\nwant %+v", got, err, want)
	}
	if _, err := parsePort(m[:10]); err == nil {
		t.Error("truncated: no error")
	}
}

func TestPortTakes(t *testing.T) {
	tap := port{index: 7, master: 3, up: true, state: stateForwarding, pvid: 10}
	good := port{index: 8, master: 3, up: true, state: stateForwarding}
	with := func(change func(*port)) port { p := good; change(&p); return p }
	alone := tap
	alone.isolated = true
	tests := []struct {
		name      string
		from, to  port
		filtering bool
		vlan      uint16
		ok        bool
	}{
		{"forwards", tap, good, false, 0, true},
		{"itself", tap, tap, false, 0, false},
		{"the bridge", tap, with(func(p *port) { p.index = 3 }), false, 0, false},
		{"another bridge's", tap, with(func(p *port) { p.master = 4 }), false, 0, false},
		{"down", tap, with(func(p *port) { p.up = false }), false, 0, false},
		{"blocked by spanning tree", tap, with(func(p *port) { p.state = 4 }), false, 0, false},
		{"isolated from one that is not", tap, with(func(p *port) { p.isolated = true }), false, 0, true},
		{"isolated from another", alone, with(func(p *port) { p.isolated = true }), false, 0, false},
		{"no member", tap, good, true, 0, false},
		{"tagged", tap, with(func(p *port) { p.vlans = map[uint16]uint16{10: 0} }), true, 10, true},
		{"untagged", tap, with(func(p *port) { p.vlans = map[uint16]uint16{10: nl.BRIDGE_VLAN_INFO_UNTAGGED} }), true, 0, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			vlan, ok := tt.to.takes(tt.from, tt.filtering)
			if ok != tt.ok || ok && vlan != tt.vlan {
				t.Errorf("got %d, %v; want %d, %v", vlan, ok, tt.vlan, tt.ok)
			}
		})
	}
}
