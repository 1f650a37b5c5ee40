package announce

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/testenv"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Frames of a guest with MAC 52:54:00:12:34:56, addresses 192.0.2.10 and
// 2001:db8::10.
const (
	hexRequest = `ffffffffffff 525400123456 0806 0001 0800 06 04 0001
		525400123456 c000020a 000000000000 c000020a 000000000000000000000000000000000000`
	hexReply = `ffffffffffff 525400123456 0806 0001 0800 06 04 0002
		525400123456 c000020a 525400123456 c000020a 000000000000000000000000000000000000`
	hexReverse = `ffffffffffff 525400123456 8035 0001 0800 06 04 0003
		525400123456 00000000 525400123456 00000000 000000000000000000000000000000000000`
	hexAdvertisement = `333300000001 525400123456 86dd 60000000 0020 3a ff
		20010db8000000000000000000000010 ff020000000000000000000000000001
		88 00 7451 20000000 20010db8000000000000000000000010 02 01 525400123456`
)

func TestFrames(t *testing.T) {
	nic := NIC{Bridge: "br0", Tap: "tap0", MAC: guestMAC}
	router := nic
	router.Router = true
	tests := []struct {
		name string
		nic  NIC
		addr netip.Addr
		want []string
	}{
		{"IPv4", nic, guest4, []string{hexRequest, hexReply}},
		{"IPv4 in IPv6", nic, netip.MustParseAddr("::ffff:192.0.2.10"), []string{hexRequest, hexReply}},
		{"IPv6", nic, guest6, []string{hexAdvertisement}},
		{"IPv6 with zone", nic, guest6.WithZone("eth0"), []string{hexAdvertisement}},
		{"router", router, guest6, []string{strings.Replace(hexAdvertisement, "7451 2000", "f450 a000", 1)}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			frames, err := framesFor(tt.nic, tt.addr)
			if err != nil {
				t.Fatal(err)
			}
			if len(frames) != len(tt.want) {
				t.Fatalf("%d frames, want %d", len(frames), len(tt.want))
			}
			for i, f := range frames {
				got, err := f.bytes(0)
				if err != nil {
					t.Fatal(err)
				}
				if want := unhex(t, tt.want[i]); !bytes.Equal(got, want) {
					t.Errorf("frame %d:\n got %x\nwant %x", i, got, want)
				}
			}
		})
	}
	f, err := reverseRequest(nic)
	if err != nil {
		t.Fatal(err)
	}
	got, err := f.bytes(0)
	if err != nil || !bytes.Equal(got, unhex(t, hexReverse)) {
		t.Errorf("RARP: %x, %v", got, err)
	}
	got, err = f.bytes(10)
	if err != nil || !bytes.Equal(got[12:18], []byte{0x81, 0, 0, 10, 0x80, 0x35}) {
		t.Errorf("tagged RARP: %x, %v", got, err)
	}
	for _, bad := range []string{"0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "0.1.2.3", "::", "::1", "ff02::1"} {
		if _, err := framesFor(nic, netip.MustParseAddr(bad)); err == nil {
			t.Errorf("%s: no error", bad)
		}
	}
	if _, err := framesFor(nic, netip.Addr{}); err == nil {
		t.Error("no address: no error")
	}
}

func TestAnnouncementOnTheWire(t *testing.T) {
	n := newNetwork(t, 0)
	n.guestAtSource(t)
	seen := n.client.listen("eth0")
	n.destination.must(func() error {
		got, err := Announce(t.Context(), []NIC{n.nic(guest4, guest6)}, Options{Repeats: []time.Duration{time.Millisecond}})
		if got != 2 {
			t.Errorf("announced %d addresses, want 2", got)
		}
		return err
	})
	for round := range 2 {
		for i, want := range []string{hexRequest, hexReply, hexAdvertisement} {
			if got := next(t, seen, guestMAC); !bytes.Equal(got, unhex(t, want)) {
				t.Fatalf("round %d, frame %d:\n got %x\nwant %x", round, i, got, unhex(t, want))
			}
		}
	}
	eventually(t, "the switch and the old host follow", func() bool {
		_, atSwitch := n.sw.fdb("sw", guestMAC)["destination"]
		_, atSource := n.source.fdb("br0", guestMAC)["up0"]
		return atSwitch && atSource
	})
	// The guest does not hear itself: the next frame in its tap is the client's.
	frame := append(append(bytes.Clone(guestMAC), otherMAC...), make([]byte, 50)...)
	n.client.send("eth0", frame, false)
	for {
		got := receive(t, n.new)
		if bytes.Equal(got[offSource:offType], guestMAC) && got[offType] == 0x08 {
			t.Fatalf("the guest received its own announcement: %x", got)
		}
		if bytes.Equal(got, frame) {
			break
		}
	}
}

func TestNeighboursFollow(t *testing.T) {
	n := newNetwork(t, 0)
	stale := func(a netip.Addr) *netlink.Neigh {
		return &netlink.Neigh{LinkIndex: n.client.index("eth0"), State: netlink.NUD_STALE, IP: a.AsSlice(), HardwareAddr: otherMAC}
	}
	n.client.must(func() error {
		return errors.Join(netlink.NeighSet(stale(guest4)), netlink.NeighSet(stale(guest6)))
	})
	n.destination.must(func() error {
		_, err := Announce(t.Context(), []NIC{n.nic(guest4, guest6)}, Options{Repeats: noRepeats})
		return err
	})
	eventually(t, "both addresses at the guest's MAC", func() bool {
		found := 0
		n.client.must(func() error {
			list, err := netlink.NeighList(0, unix.AF_UNSPEC)
			for _, e := range list {
				a, _ := netip.AddrFromSlice(e.IP)
				a = a.Unmap()
				if (a == guest4 || a == guest6) && bytes.Equal(e.HardwareAddr, guestMAC) {
					found++
				}
			}
			return err
		})
		return found == 2
	})
}

func TestAnnounceWithoutAddress(t *testing.T) {
	n := newNetwork(t, 0)
	n.guestAtSource(t)
	seen := n.client.listen("eth0")
	n.destination.must(func() error {
		got, err := Announce(t.Context(), []NIC{n.nic()}, Options{Repeats: noRepeats})
		if got != 0 {
			t.Errorf("announced %d addresses, want 0", got)
		}
		return err
	})
	if got := next(t, seen, guestMAC); !bytes.Equal(got, unhex(t, hexReverse)) {
		t.Errorf("got %x", got)
	}
	eventually(t, "the switch follows", func() bool {
		_, ok := n.sw.fdb("sw", guestMAC)["destination"]
		return ok
	})
}

// One card's trouble is its own, and is told by name.
func TestAnnounceRest(t *testing.T) {
	n := newNetwork(t, 0)
	seen := n.client.listen("eth0")
	gone := n.nic(guest4)
	gone.Tap = "tap9"
	odd := n.nic(netip.MustParseAddr("224.0.0.1"), guest4)
	n.destination.must(func() error {
		got, err := Announce(t.Context(), []NIC{gone, odd}, Options{Repeats: noRepeats})
		if got != 1 {
			t.Errorf("announced %d addresses, want 1", got)
		}
		for _, want := range []string{"tap9", "224.0.0.1"} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("error %v does not name %s", err, want)
			}
		}
		return nil
	})
	if got := next(t, seen, guestMAC); !bytes.Equal(got, unhex(t, hexRequest)) {
		t.Errorf("got %x", got)
	}
}

func TestAnnounceCancelled(t *testing.T) {
	n := newNetwork(t, 0)
	n.destination.must(func() error {
		ctx, cancel := context.WithCancel(t.Context())
		a, err := Begin(ctx, []NIC{n.nic(guest4)}, Options{Repeats: []time.Duration{time.Hour}})
		if err != nil || a.Announced() != 1 {
			t.Errorf("begin: %v", err)
		}
		cancel()
		if err := a.Repeat(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("repeat: %v", err)
		}
		if err := a.Close(); err != nil {
			t.Errorf("second close: %v", err)
		}
		if n, err := Announce(ctx, nil, Options{}); n != 0 || !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled before: %d, %v", n, err)
		}
		return nil
	})
}

func TestRedirect(t *testing.T) {
	n := newNetwork(t, 0)
	n.guestAtSource(t)
	n.destination.must(func() error { return Redirect(n.nic()) })
	got := n.destination.fdb("br0", guestMAC)
	if state, ok := got["tap0"]; !ok || len(got) != 1 || state&(netlink.NUD_PERMANENT|netlink.NUD_NOARP) != 0 {
		t.Errorf("entries %v, want one dynamic on tap0", got)
	}
	// A frame from the network now ends in the tap, before the guest has said
	// anything.
	frame := append(append(bytes.Clone(guestMAC), otherMAC...), make([]byte, 50)...)
	n.sw.send("destination", frame, false)
	for !bytes.Equal(receive(t, n.new), frame) {
	}

	n.destination.tap("tap1", 0)
	bad := map[string]NIC{
		"not a port of br0":  {Bridge: "br0", Tap: "tap1", MAC: guestMAC},
		"not a Linux bridge": {Bridge: "up0", Tap: "tap0", MAC: guestMAC},
		"find bridge br9":    {Bridge: "br9", Tap: "tap0", MAC: guestMAC},
		"find tap9":          {Bridge: "br0", Tap: "tap9", MAC: guestMAC},
		"group address":      {Bridge: "br0", Tap: "tap0", MAC: net.HardwareAddr{1, 0, 0, 0, 0, 1}},
		"0 bytes":            {Bridge: "br0", Tap: "tap0"},
		"needs a bridge":     {MAC: guestMAC},
	}
	n.destination.must(func() error {
		for want, nic := range bad {
			if err := Redirect(nic); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("error %v, want %q", err, want)
			}
		}
		if err := netlink.LinkSetDown(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tap0"}}); err != nil {
			return err
		}
		if err := Redirect(n.nic()); err == nil || !strings.Contains(err.Error(), "is down") {
			t.Errorf("tap down: %v", err)
		}
		return nil
	})
}

// On bridges that filter VLANs the announcement stays in the tap's.
func TestAnnounceVLAN(t *testing.T) {
	host, client, stranger := newSpace(t), newSpace(t), newSpace(t)
	if err := host.addBridge("br0", true); errors.Is(err, unix.EOPNOTSUPP) {
		testenv.Lacks(t, "a kernel with CONFIG_BRIDGE_VLAN_FILTERING", err)
	} else if err != nil {
		t.Fatal(err)
	}
	host.tap("tap0", 0)
	host.wire("trunk", client, "eth0")
	host.wire("other", stranger, "eth0")
	for _, p := range []string{"tap0", "trunk", "other"} {
		host.enslave(p, "br0")
	}
	host.must(func() error {
		tap, err := netlink.LinkByName("tap0")
		if err != nil {
			return err
		}
		trunk, err := netlink.LinkByName("trunk")
		if err != nil {
			return err
		}
		return errors.Join(
			netlink.BridgeVlanDel(tap, 1, true, true, false, true),
			netlink.BridgeVlanAdd(tap, 10, true, true, false, true),
			netlink.BridgeVlanAdd(trunk, 10, false, false, false, true))
	})
	host.must(func() error {
		ways, err := waysOut(NIC{Bridge: "br0", Tap: "tap0", MAC: guestMAC}, false)
		if err != nil {
			return err
		}
		trunk, err := net.InterfaceByName("trunk")
		if err != nil {
			return err
		}
		if len(ways) != 1 || ways[0] != (way{index: trunk.Index, vlan: 10}) {
			t.Errorf("ways %v, want only port %d with tag 10", ways, trunk.Index)
		}
		return nil
	})
	client.must(func() error {
		parent, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		v := &netlink.Vlan{LinkAttrs: netlink.NewLinkAttrs(), VlanId: 10}
		v.Name, v.ParentIndex = "vlan10", parent.Index
		return errors.Join(netlink.LinkAdd(v), netlink.LinkSetUp(v))
	})
	seen := client.listen("vlan10")
	host.must(func() error {
		_, err := Announce(t.Context(), []NIC{{Bridge: "br0", Tap: "tap0", MAC: guestMAC, Addresses: []netip.Addr{guest4}}}, Options{Repeats: noRepeats})
		return err
	})
	if got := next(t, seen, guestMAC); !bytes.Equal(got[:42], unhex(t, hexRequest)[:42]) {
		t.Errorf("got %x", got)
	}
}
