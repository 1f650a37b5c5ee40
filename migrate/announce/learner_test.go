package announce

import (
	"bytes"
	"context"
	"encoding/binary"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// Frames as a guest and its network send them, MACs 52:54:00:12:34:56 (guest)
// and 52:54:00:aa:bb:cc (other).
const (
	hexProbe    = `ffffffffffff 525400123456 0806 0001 0800 06 04 0001 525400123456 00000000 000000000000 c000020a`
	hexARPOther = `ffffffffffff 525400aabbcc 0806 0001 0800 06 04 0001 525400aabbcc c000020a 000000000000 c0000201`
	// A solicitation from fe80::1 for 2001:db8::1, and duplicate address
	// detection of 2001:db8::10.
	hexSolicitation = `3333ff000001 525400123456 86dd 60000000 0020 3a ff
		fe800000000000000000000000000001 ff0200000000000000000001ff000001
		87 00 0000 00000000 20010db8000000000000000000000001 01 01 525400123456`
	hexDAD = `3333ff000010 525400123456 86dd 60000000 0018 3a ff
		00000000000000000000000000000000 ff0200000000000000000001ff000010
		87 00 0000 00000000 20010db8000000000000000000000010`
	hexRouterAdv = `333300000001 525400123456 86dd 60000000 0010 3a ff
		fe800000000000000000000000000001 ff020000000000000000000000000001
		86 00 0000 40 00 0708 00000000 00000000`
)

// dhcp builds a message in UDP in IPv4 in Ethernet.
func dhcp(fromGuest bool, kind byte, xid uint32, current, yours, wanted netip.Addr) []byte {
	m := make([]byte, 240)
	m[0], m[1], m[2] = 2, 1, 6
	src, dst, sport, dport := otherMAC, guestMAC, uint16(67), uint16(68)
	if fromGuest {
		m[0] = 1
		src, dst, sport, dport = guestMAC, bytes.Repeat([]byte{0xff}, 6), 68, 67
	}
	binary.BigEndian.PutUint32(m[4:], xid)
	for off, a := range map[int]netip.Addr{12: current, 16: yours} {
		if a.IsValid() {
			copy(m[off:], a.AsSlice())
		}
	}
	copy(m[28:], guestMAC)
	copy(m[236:], "\x63\x82\x53\x63")
	m = append(m, 0, 53, 1, kind) // a pad first
	if wanted.IsValid() {
		m = append(append(m, 50, 4), wanted.AsSlice()...)
	}
	m = append(m, 255)
	b := append(append(append([]byte{}, dst...), src...), 8, 0)
	b = append(b, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255)
	binary.BigEndian.PutUint16(b[offIP+2:], uint16(28+len(m)))
	// A bridge with netfilter drops a packet with a wrong header checksum.
	binary.BigEndian.PutUint16(b[offIP+10:], ^sum(b[offIP:offIP+20]))
	b = binary.BigEndian.AppendUint16(b, sport)
	b = binary.BigEndian.AppendUint16(b, dport)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(m)))
	return append(append(b, 0, 0), m...)
}

func TestSight(t *testing.T) {
	none := netip.Addr{}
	linkLocal := netip.MustParseAddr("fe80::1")
	fromOther := func(s string) string { return strings.ReplaceAll(s, "525400123456", "525400aabbcc") }
	h := func(s string) []byte { return unhex(t, s) }
	tests := []struct {
		name string
		b    []byte
		want sighting
	}{
		{"ARP request", h(hexRequest), sighting{uses: guest4}},
		{"ARP reply", h(hexReply), sighting{uses: guest4}},
		{"ARP probe", h(hexProbe), sighting{}},
		{"ARP of another", h(hexARPOther), sighting{gone: guest4}},
		{"ARP for another's MAC", h(strings.Replace(hexRequest, "0001\n\t\t525400123456", "0001 525400aabbcc", 1)), sighting{}},
		{"ARP cut short", h(hexProbe)[:41], sighting{}},
		{"ARP of other lengths", h(strings.Replace(hexRequest, "06 04", "06 10", 1)), sighting{}},
		{"RARP", h(hexReverse), sighting{}},
		{"advertisement", h(hexAdvertisement), sighting{uses: guest6}},
		{"router's advertisement", h(strings.Replace(hexAdvertisement, "7451 2000", "f450 a000", 1)), sighting{uses: guest6, routes: true}},
		{"advertisement of another", h(fromOther(hexAdvertisement)), sighting{gone: guest6}},
		{"advertisement for another's MAC", h(strings.Replace(hexAdvertisement, "02 01 525400123456", "02 01 525400aabbcc", 1)), sighting{}},
		{"advertisement from afar", h(strings.Replace(hexAdvertisement, "3a ff", "3a 40", 1)), sighting{}},
		{"advertisement cut short", h(hexAdvertisement)[:70], sighting{}},
		{"solicitation", h(hexSolicitation), sighting{uses: linkLocal}},
		{"solicitation of another", h(fromOther(hexSolicitation)), sighting{}},
		{"duplicate address detection", h(hexDAD), sighting{tries: guest6}},
		{"router advertisement", h(hexRouterAdv), sighting{uses: linkLocal, routes: true}},
		{"discover", dhcp(true, dhcpDiscover, 7, none, none, guest4), sighting{asked: true, xid: 7}},
		{"request", dhcp(true, dhcpRequest, 7, none, none, guest4), sighting{asked: true, xid: 7}},
		{"renewal", dhcp(true, dhcpRequest, 7, guest4, none, none), sighting{asked: true, xid: 7, uses: guest4}},
		{"inform", dhcp(true, dhcpInform, 7, guest4, none, none), sighting{xid: 7, uses: guest4}},
		{"decline", dhcp(true, dhcpDecline, 7, none, none, guest4), sighting{xid: 7, gone: guest4}},
		{"release", dhcp(true, dhcpRelease, 7, guest4, none, none), sighting{xid: 7, gone: guest4}},
		{"ACK", dhcp(false, dhcpACK, 7, none, guest4, none), sighting{xid: 7, granted: guest4}},
		{"offer", dhcp(false, 2, 7, none, guest4, none), sighting{}},
		{"ACK from the guest", dhcp(true, dhcpACK, 7, none, guest4, none), sighting{xid: 7}},
		{"DHCP cut short", dhcp(true, dhcpRequest, 7, guest4, none, none)[:281], sighting{}},
		{"nothing", nil, sighting{}},
		{"header only", h(hexRequest)[:14], sighting{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := sight(tt.b, guestMAC); got != tt.want {
				t.Errorf("got %+v\nwant %+v", got, tt.want)
			}
		})
	}
}

func TestBook(t *testing.T) {
	start := time.Unix(1000, 0)
	var k book
	check := func(at time.Duration, want ...netip.Addr) {
		t.Helper()
		if got := k.addresses(start.Add(at)); !slices.Equal(got, want) {
			t.Fatalf("after %v: %v, want %v", at, got, want)
		}
	}
	// An address on trial counts when nobody has objected.
	k.add(sighting{tries: guest6}, start)
	check(trialTime - 1)
	check(trialTime, guest6)
	k.add(sighting{gone: guest6}, start.Add(trialTime/2))
	check(trialTime)
	// Use ends the trial, and another trial does not take it back.
	k.add(sighting{tries: guest6}, start)
	k.add(sighting{uses: guest6}, start)
	k.add(sighting{tries: guest6}, start)
	check(0, guest6)
	// A grant counts for the guest's last request only, and once.
	k.add(sighting{granted: guest4, xid: 0}, start)
	k.add(sighting{asked: true, xid: 7}, start)
	k.add(sighting{granted: guest4, xid: 8}, start)
	check(0, guest6)
	k.add(sighting{granted: guest4, xid: 7}, start)
	check(0, guest4, guest6)
	k.add(sighting{granted: client4, xid: 7}, start)
	check(0, guest4, guest6)
	// The seventeenth takes the place of the one not seen for longest.
	a := netip.MustParseAddr("198.51.100.0")
	for range maxAddresses {
		k.add(sighting{uses: guest4}, start)
		a = a.Next()
		k.add(sighting{uses: a}, start)
	}
	got := k.addresses(start)
	if len(got) != maxAddresses+1 || !slices.Contains(got, guest4) || slices.Contains(got, netip.MustParseAddr("198.51.100.1")) {
		t.Fatalf("after a flood: %v", got)
	}
}

func TestLearner(t *testing.T) {
	n := newNetwork(t, 0)
	var l *Learner
	n.source.must(func() (err error) {
		l, err = Start(t.Context(), "tap0", guestMAC)
		return err
	})
	say := func(b []byte) {
		t.Helper()
		if _, err := n.old.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	learns := func(want ...string) {
		t.Helper()
		eventually(t, strings.Join(want, " "), func() bool {
			var got []string
			for _, a := range l.Addresses() {
				got = append(got, a.String())
			}
			return reflect.DeepEqual(got, want)
		})
	}
	none := netip.Addr{}
	say(unhex(t, hexProbe))
	say(unhex(t, hexSolicitation))
	learns("fe80::1")
	say(unhex(t, hexAdvertisement))
	learns("2001:db8::10", "fe80::1")
	say(unhex(t, hexRequest))
	learns("192.0.2.10", "2001:db8::10", "fe80::1")
	// A lease: the request waits in the learner's socket before the answer.
	lease := netip.MustParseAddr("192.0.2.99")
	say(dhcp(true, dhcpRequest, 42, none, none, lease))
	eventually(t, "the request", func() bool { l.mu.Lock(); defer l.mu.Unlock(); return l.book.asked })
	n.client.send("eth0", dhcp(false, dhcpACK, 42, none, lease, none), false)
	learns("192.0.2.10", "192.0.2.99", "2001:db8::10", "fe80::1")
	say(dhcp(true, dhcpRelease, 43, lease, none, none))
	learns("192.0.2.10", "2001:db8::10", "fe80::1")
	// Another machine has taken the address.
	n.client.send("eth0", unhex(t, hexARPOther), false)
	learns("2001:db8::10", "fe80::1")

	// Ordinary traffic never reaches the socket.
	if _, err := l.conn.Stats(); err != nil { // and sets the counter to zero
		t.Fatal(err)
	}
	udp := dhcp(true, dhcpRequest, 1, guest4, none, none)
	binary.BigEndian.PutUint16(udp[offIP+22:], 53)
	tagged := slices.Insert(unhex(t, hexRequest), offType, 0x81, 0, 0, 5)
	stranger := unhex(t, strings.Replace(hexARPOther, "c0000201", "c0000202", 1)) // which nobody answers
	fragment := dhcp(true, dhcpRequest, 1, guest4, none, none)
	fragment[off4Fragment+1] = 1
	for range 10 {
		say(udp)
		say(tagged)
		say(stranger) // from the guest, with a MAC that is not its own
		say(fragment)
	}
	say(unhex(t, hexReply))
	learns("192.0.2.10", "2001:db8::10", "fe80::1")
	if s, err := l.conn.Stats(); err != nil || s.Packets != 1 {
		t.Errorf("%+v packets passed the filter, want 1; %v", s, err)
	}

	n.source.must(func() error {
		tap := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tap0"}}
		if err := netlink.LinkSetDown(tap); err != nil {
			return err
		}
		return netlink.LinkSetUp(tap)
	})
	say(dhcp(true, dhcpInform, 1, netip.MustParseAddr("192.0.2.11"), none, none))
	learns("192.0.2.10", "192.0.2.11", "2001:db8::10", "fe80::1")
	if l.Router() {
		t.Error("taken for a router")
	}
	say(unhex(t, hexRouterAdv))
	eventually(t, "a router", l.Router)
	for range 2 {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	learns("192.0.2.10", "192.0.2.11", "2001:db8::10", "fe80::1")
}

func TestLearnerEnds(t *testing.T) {
	s := newSpace(t)
	tap := s.tap("tap0", 0)
	ctx, cancel := context.WithCancel(t.Context())
	var l *Learner
	s.must(func() (err error) {
		l, err = Start(ctx, "tap0", guestMAC)
		return err
	})
	tap.Close() // and with it the tap
	cancel()
	<-l.done
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	s.must(func() error {
		if _, err := Start(t.Context(), "tap9", guestMAC); err == nil || !strings.Contains(err.Error(), "tap9") {
			t.Errorf("no tap: %v", err)
		}
		if _, err := Start(t.Context(), "lo", nil); err == nil {
			t.Error("no MAC: no error")
		}
		return nil
	})
}

func FuzzSight(f *testing.F) {
	for _, s := range []string{hexRequest, hexReply, hexProbe, hexAdvertisement, hexSolicitation, hexDAD, hexRouterAdv} {
		f.Add(unhex(f, s))
	}
	f.Add(dhcp(true, dhcpRequest, 7, guest4, netip.Addr{}, guest4))
	f.Add(dhcp(false, dhcpACK, 7, netip.Addr{}, guest4, netip.Addr{}))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := sight(b, guestMAC)
		for _, a := range []netip.Addr{s.uses, s.tries, s.gone, s.granted} {
			if a.IsValid() && (!usable(a) || a.Zone() != "") {
				t.Errorf("%v is no host's address", a)
			}
		}
		var k book
		for range 3 {
			k.add(s, time.Unix(0, 0))
		}
		if n := len(k.addresses(time.Unix(100, 0))); n > 3 {
			t.Errorf("%d addresses from one frame", n)
		}
	})
}
