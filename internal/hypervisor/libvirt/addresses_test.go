package libvirt

import (
	"net/netip"
	"reflect"
	"testing"

	lv "github.com/digitalocean/go-libvirt"

	"github.com/lmctl/lmctl/internal/hypervisor/nics"
)

// What leases and agents say is added to what was learnt, and nothing that is not
// a card's.
func TestAddAddresses(t *testing.T) {
	addr := netip.MustParseAddr
	facts := map[string]nics.Facts{
		"52:54:00:00:00:01": {Addresses: []netip.Addr{addr("10.0.0.1")}, Router: true},
		"52:54:00:00:00:02": {},
	}
	of := func(mac string, addresses ...string) lv.DomainInterface {
		i := lv.DomainInterface{Name: "eth", Hwaddr: lv.OptString{mac}}
		for _, a := range addresses {
			i.Addrs = append(i.Addrs, lv.DomainIPAddr{Addr: a})
		}
		return i
	}
	addAddresses(facts, []lv.DomainInterface{
		of("52:54:00:00:00:01", "10.0.0.1", "fe80::1", "10.0.0.9"),
		of("52:54:00:00:00:01", "10.0.0.9"), // another name for it
		of("00:00:00:00:00:00", "127.0.0.1", "::1"),
		of("52:54:00:00:00:02", "nonsense", "0.0.0.0", "224.0.0.1", "127.0.0.1", "fe80::2%eth0"),
		of("not a MAC", "10.0.0.7"),
		{Name: "lo", Addrs: []lv.DomainIPAddr{{Addr: "10.0.0.8"}}},
	})
	want := map[string]nics.Facts{
		"52:54:00:00:00:01": {Addresses: []netip.Addr{addr("10.0.0.1"), addr("fe80::1"), addr("10.0.0.9")}, Router: true},
		"52:54:00:00:00:02": {Addresses: []netip.Addr{addr("fe80::2")}},
	}
	if !reflect.DeepEqual(facts, want) {
		t.Errorf("got %v, want %v", facts, want)
	}
}

func TestAddressesOfTheDefinition(t *testing.T) {
	f, err := parseFacts(`<domain type='kvm'><name>g</name><devices>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><target dev='vnet0'/>
<filterref filter='clean-traffic'><parameter name='IP' value='192.0.2.7'/><parameter name='IP' value='192.0.2.8'/>
<parameter name='IPV6' value='2001:db8::7'/><parameter name='CTRL_IP_LEARNING' value='dhcp'/></filterref></interface></devices></domain>`)
	if err != nil {
		t.Fatal(err)
	}
	want := []netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("192.0.2.8"), netip.MustParseAddr("2001:db8::7")}
	if len(f.cards) != 1 || !reflect.DeepEqual(f.cards[0].Addresses, want) {
		t.Errorf("cards %v, want one with %v", f.cards, want)
	}
	if !hasAgent(f.xml) {
		t.Error("the agent is not seen")
	}
	f.xml.Devices.Channels[0].Target.VirtIO.State = "disconnected"
	if hasAgent(f.xml) || hasAgent(nil) {
		t.Error("an agent is seen that is not there")
	}
}
