package announce

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	ipUDP = 17
	ipTCP = 6
)

// strand begins to keep what comes to the source for the guest.
func (n *network) strand(t *testing.T) *Stranded {
	t.Helper()
	var s *Stranded
	n.source.must(func() (err error) {
		s, err = OpenStranded(n.nic(guest4))
		return err
	})
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// awaitHeld waits until count frames have been taken, which the reader does in
// its own time.
func awaitHeld(t *testing.T, s *Stranded, count int) {
	t.Helper()
	eventually(t, "the frames are held", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.held) == count
	})
}

// past is a context that is done.
func past(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

// datagrams sends UDP from the client's own stack to the guest, which leaves
// the checksum to the card.
func (n *network) datagrams(from, to int) {
	n.client.t.Helper()
	n.client.must(func() error {
		l, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		err = netlink.NeighSet(&netlink.Neigh{LinkIndex: l.Index, State: netlink.NUD_PERMANENT, IP: guest4.AsSlice(), HardwareAddr: guestMAC})
		if err != nil {
			return err
		}
		c, err := net.Dial("udp4", net.JoinHostPort(guest4.String(), "4000"))
		if err != nil {
			return err
		}
		defer c.Close()
		for i := from; i < to; i++ {
			if _, err := fmt.Fprintf(c, "datagram %d", i); err != nil {
				return err
			}
		}
		return nil
	})
}

// moveGuest announces the guest at the destination.
func (n *network) moveGuest(t *testing.T) {
	t.Helper()
	n.destination.must(func() error {
		_, err := Announce(t.Context(), []NIC{n.nic(guest4)}, Options{Repeats: noRepeats})
		return err
	})
	eventually(t, "the switch follows", func() bool {
		_, ok := n.sw.fdb("sw", guestMAC)["destination"]
		return ok
	})
}

// ipPayload checks a frame's IPv4 and UDP or TCP checksums and returns what is
// above.
func ipPayload(t *testing.T, b []byte, protocol byte) []byte {
	t.Helper()
	ip := b[offIP:]
	if len(ip) < 20 || ip[0] != 0x45 || ip[9] != protocol || sum(ip[:20]) != 0xffff {
		t.Fatalf("not the IPv4 packet that was sent: %x", b)
	}
	ip = ip[:binary.BigEndian.Uint16(ip[2:])]
	pseudo := []byte{0, protocol, 0, 0}
	binary.BigEndian.PutUint16(pseudo[2:], uint16(len(ip)-20))
	if got := sum(ip[12:20], pseudo, ip[20:]); got != 0xffff {
		t.Errorf("checksum over %x comes to %#x", ip, got)
	}
	if protocol == ipUDP {
		return ip[28:]
	}
	return ip[20+int(ip[32]>>4)*4:]
}

// nextFrom reads the guest's tap until a frame of this IP protocol for it.
func nextFrom(t *testing.T, f *os.File, protocol byte) []byte {
	t.Helper()
	for {
		b := receive(t, f)
		if bytes.Equal(b[:6], guestMAC) && b[offType] == 8 && b[offType+1] == 0 && b[off4Protocol] == protocol {
			return b
		}
	}
}

func TestStrandedArriveOnce(t *testing.T) {
	n := newNetwork(t, unix.IFF_VNET_HDR)
	n.offload(t)
	n.guestAtSource(t)
	s := n.strand(t)
	const delivered, before, after = 10, 30, 50
	n.datagrams(0, delivered)
	awaitHeld(t, s, delivered)
	s.Stopped(time.Now())
	n.datagrams(delivered, before)
	n.client.send("eth0", unhex(t, hexARPOther), false) // a broadcast, not to be sent on
	awaitHeld(t, s, before)
	n.moveGuest(t)
	seen := n.destination.listen("up0")

	// What is there is sent on even with no time left, and not twice.
	for range 2 {
		sent, err := s.Forward(past(t))
		if err != nil || sent != before-delivered {
			t.Fatalf("%d frames sent on, want %d; %v", sent, before-delivered, err)
		}
	}
	n.datagrams(before, after) // which find their own way
	bridge := n.source.mac("br0")
	for i := delivered; i < after; i++ {
		b := nextFrom(t, n.new, ipUDP)
		if got, want := string(ipPayload(t, b, ipUDP)), fmt.Sprintf("datagram %d", i); got != want {
			t.Fatalf("got %q, want %q", got, want)
		}
		if i < before && !bytes.Equal(b[offSource:offType], bridge) {
			t.Fatalf("came from %x, want the bridge %v", b[offSource:offType], bridge)
		}
	}
	// The switch still knows the client where it is.
	client := n.client.mac("eth0")
	if at := n.sw.fdb("sw", client); len(at) != 1 || at["client"] == 0 {
		t.Errorf("the switch has the client on %v", at)
	}
	if got := next(t, seen, bridge); !bytes.Equal(got[:6], guestMAC) {
		t.Errorf("sent on: %x", got)
	}
	if d := s.Dropped(); d != 0 {
		t.Errorf("%d frames dropped", d)
	}
}

// offload has the source's tap take unfinished checksums and large segments,
// as a guest's virtio-net card does.
func (n *network) offload(t *testing.T) {
	t.Helper()
	raw, err := n.old.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	e := raw.Control(func(fd uintptr) {
		const csumTSO4 = 1 | 2 // TUN_F_CSUM | TUN_F_TSO4
		err = errors.Join(unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, csumTSO4),
			unix.IoctlSetPointerInt(int(fd), unix.TUNSETVNETHDRSZ, 12))
	})
	if e != nil || err != nil {
		t.Fatal(e, err)
	}
}

// A frame of the very moment of the stop counts, one of the microsecond before
// does not, and neither does one of which the kernel took no time.
func TestStrandedBoundary(t *testing.T) {
	stop := time.Unix(1000, 5000)
	times := []time.Time{{}, stop.Add(-1), stop, stop.Add(1)}
	known := &Stranded{limit: 10, more: make(chan struct{}, 1)}
	known.Stopped(stop)
	learnt := &Stranded{limit: 10, more: make(chan struct{}, 1)}
	for i, at := range times {
		f := heldFrame{at: at, b: []byte{byte(i)}}
		known.hold(f)
		learnt.hold(f)
	}
	learnt.Stopped(stop)
	for name, s := range map[string]*Stranded{"known": known, "learnt": learnt} {
		s.mu.Lock()
		s.discard(s.early())
		s.mu.Unlock()
		if len(s.held) != 2 || s.held[0].b[0] != 2 || s.held[1].b[0] != 3 || s.bytes != 2 || s.kept != 2 {
			t.Errorf("%s: %d bytes of %v, %d kept", name, s.bytes, s.held, s.kept)
		}
	}
}

// A tap whose queue is full, which nobody reads, loses no frame for it.
func TestStrandedFullTap(t *testing.T) {
	n := newNetwork(t, 0)
	n.guestAtSource(t)
	s := n.strand(t)
	n.source.must(func() error {
		l, err := netlink.LinkByName("tap0")
		if err != nil {
			return err
		}
		return netlink.LinkSetTxQLen(l, 4)
	})
	s.Stopped(time.Now())
	const count = 100
	n.datagrams(0, count)
	awaitHeld(t, s, count)
	n.source.must(func() error {
		l, err := netlink.LinkByName("tap0")
		if err == nil && l.Attrs().Statistics.TxDropped == 0 {
			err = errors.New("the tap's queue was not full")
		}
		return err
	})
	n.moveGuest(t)
	if sent, err := s.Forward(past(t)); sent != count || err != nil {
		t.Fatalf("%d sent on, want %d; %v", sent, count, err)
	}
	for i := range count {
		b := nextFrom(t, n.new, ipUDP)
		if got, want := string(ipPayload(t, b, ipUDP)), fmt.Sprintf("datagram %d", i); got != want {
			t.Fatalf("got %q, want %q", got, want)
		}
	}
}

// Tags of networks inside the guest arrive with the frame.
func TestStrandedTagged(t *testing.T) {
	n := newNetwork(t, 0)
	n.guestAtSource(t)
	s := n.strand(t)
	s.Stopped(time.Now())
	b := append(append(bytes.Clone(guestMAC), n.client.mac("eth0")...), 0x81, 0, 0x60, 7, 0x88, 0xb5)
	n.client.send("eth0", append(b, make([]byte, 46)...), false)
	awaitHeld(t, s, 1)
	n.moveGuest(t)
	if sent, err := s.Forward(past(t)); sent != 1 || err != nil {
		t.Fatalf("%d sent on; %v", sent, err)
	}
	for {
		got := receive(t, n.new)
		if bytes.Equal(got[:6], guestMAC) {
			if !bytes.Equal(got[offType:18], b[offType:]) {
				t.Errorf("got %x\nwant %x", got[:18], b)
			}
			return
		}
	}
}

func (s space) mac(name string) (mac net.HardwareAddr) {
	s.t.Helper()
	s.must(func() error {
		i, err := net.InterfaceByName(name)
		if err == nil {
			mac = i.HardwareAddr
		}
		return err
	})
	return mac
}

// A large TCP segment in the tap's queue leaves in pieces, each with its
// checksum.
func TestStrandedSegments(t *testing.T) {
	n := newNetwork(t, unix.IFF_VNET_HDR)
	n.offload(t)
	n.guestAtSource(t)
	s := n.strand(t)
	s.Stopped(time.Now())
	data := bytes.Repeat([]byte("0123456789"), 250)
	n.client.send("eth0", segment(n.client.mac("eth0"), data, 1000), true)
	awaitHeld(t, s, 1)
	n.moveGuest(t)
	if sent, err := s.Forward(past(t)); sent != 1 || err != nil {
		t.Fatalf("%d sent on; %v", sent, err)
	}
	var got []byte
	for _, want := range []int{1000, 1000, 500} {
		p := ipPayload(t, nextFrom(t, n.new, ipTCP), ipTCP)
		if len(p) != want {
			t.Errorf("segment of %d bytes, want %d", len(p), want)
		}
		got = append(got, p...)
	}
	if !bytes.Equal(got, data) {
		t.Errorf("the data differ")
	}
}

// segment is a TCP segment to the guest that is to be cut into pieces of mss
// bytes, behind a virtio-net header.
func segment(from net.HardwareAddr, data []byte, mss uint16) []byte {
	b := make([]byte, offloadHeader)
	b[hdrFlags], b[hdrGSOType] = flagNeedsCsum, unix.VIRTIO_NET_HDR_GSO_TCPV4
	binary.NativeEndian.PutUint16(b[hdrLength:], 54)
	binary.NativeEndian.PutUint16(b[hdrGSOSize:], mss)
	binary.NativeEndian.PutUint16(b[hdrCsumStart:], 34)
	binary.NativeEndian.PutUint16(b[hdrCsumOff:], 16)
	b = append(append(append(b, guestMAC...), from...), 8, 0)
	ip := make([]byte, 20)
	ip[0], ip[8], ip[9] = 0x45, 64, ipTCP
	binary.BigEndian.PutUint16(ip[2:], uint16(40+len(data)))
	copy(ip[12:], client4.AsSlice())
	copy(ip[16:], guest4.AsSlice())
	binary.BigEndian.PutUint16(ip[10:], ^sum(ip))
	tcp := []byte{0, 80, 15, 160, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 1, 0, 0, 0, 0, 0}
	length := binary.BigEndian.AppendUint16([]byte{0, ipTCP}, uint16(20+len(data)))
	binary.BigEndian.PutUint16(tcp[16:], sum(ip[12:20], length))
	return append(append(append(b, ip...), tcp...), data...)
}

// Frames that come to the old host while Forward runs are sent on too, and it
// ends with its context.
func TestStrandedLate(t *testing.T) {
	n := newNetwork(t, 0)
	n.guestAtSource(t)
	s := n.strand(t)
	s.Stopped(time.Now())
	// The destination knows its guest, the switch does not yet.
	n.destination.must(func() error { return Redirect(n.nic()) })
	n.sw.must(func() error {
		l, err := netlink.LinkByName("source")
		if err != nil {
			return err
		}
		return netlink.NeighDel(&netlink.Neigh{LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER, HardwareAddr: guestMAC})
	})
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error)
	go func() {
		_, err := s.Forward(ctx)
		result <- err
	}()
	late := append(append(bytes.Clone(guestMAC), otherMAC...), 0x88, 0xb5, 'l', 'a', 't', 'e') // a type for experiments
	index := n.source.index("tap0")
	n.source.must(func() error { // as the bridge does with a frame for the tap
		o, err := openOutlet(false)
		if err != nil {
			return err
		}
		return errors.Join(o.send(ctx, index, append(late, make([]byte, 42)...)), o.close())
	})
	for !bytes.Contains(receive(t, n.new), []byte("late")) {
	}
	cancel()
	if err := <-result; err != nil {
		t.Error(err)
	}
}

func TestStrandedBounded(t *testing.T) {
	frames := func(s *Stranded, from, to int) {
		for i := from; i < to; i++ {
			s.hold(heldFrame{at: time.Unix(int64(i), 0), b: []byte{byte(i)}})
		}
	}
	s := &Stranded{limit: 5, more: make(chan struct{}, 1)}
	frames(s, 0, 9) // the newest are held
	if len(s.held) != 5 || s.held[0].b[0] != 4 || s.bytes != 5 {
		t.Fatalf("%d bytes of %v", s.bytes, s.held)
	}
	s.Stopped(time.Unix(7, 0))
	frames(s, 9, 20) // the first ones are kept
	s.discard(s.early())
	if len(s.held) != 5 || s.held[0].b[0] != 7 || s.held[4].b[0] != 11 || s.dropped != 8 {
		t.Fatalf("%v, %d dropped", s.held, s.dropped)
	}
	if _, err := s.Forward(past(t)); !errors.Is(err, ErrTooMany) {
		t.Errorf("Forward: %v", err)
	}

	s = &Stranded{limit: 10, more: make(chan struct{}, 1)}
	big := heldFrame{at: time.Unix(1, 0), b: make([]byte, maxHeld/2)}
	for range 3 {
		s.hold(big)
	}
	if len(s.held) != 2 || s.bytes != maxHeld {
		t.Errorf("%d frames of %d bytes held", len(s.held), s.bytes)
	}
	s.Stopped(big.at)
	s.hold(big)
	if len(s.held) != 2 || s.bytes != maxHeld || s.dropped != 1 {
		t.Errorf("%d frames of %d bytes held, %d dropped", len(s.held), s.bytes, s.dropped)
	}
}

// Without the time of the stop nothing may be sent on.
func TestStrandedNotStopped(t *testing.T) {
	n := newNetwork(t, 0)
	n.guestAtSource(t)
	s := n.strand(t)
	n.datagrams(0, 3)
	awaitHeld(t, s, 3)
	if sent, err := s.Forward(past(t)); sent != 0 || err == nil || !strings.Contains(err.Error(), "not known") {
		t.Errorf("%d sent on; %v", sent, err)
	}
	awaitHeld(t, s, 3)
}

func TestOpenStrandedRefuses(t *testing.T) {
	n := newNetwork(t, 0)
	n.source.tap("tap1", 0)
	group, absent, lonely, elsewhere := n.nic(), n.nic(), n.nic(), n.nic()
	group.MAC = []byte{1, 0, 0, 0, 0, 0}
	absent.Tap = "tap9"
	lonely.Tap = "tap1"
	elsewhere.Bridge = "br9"
	tests := []struct {
		want string
		nic  NIC
	}{
		{"group address", group},
		{"find tap9", absent},
		{"not a port of br0", lonely},
		{"find bridge br9", elsewhere},
	}
	open := func(nic NIC, want string) {
		n.source.must(func() error {
			if s, err := OpenStranded(nic); s != nil || err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v, %v; want %q", s, err, want)
			}
			return nil
		})
	}
	for _, tt := range tests {
		open(tt.nic, tt.want)
	}
	// Without an uplink nothing can be sent on.
	n.source.must(func() error {
		l, err := netlink.LinkByName("up0")
		if err != nil {
			return err
		}
		return netlink.LinkSetNoMaster(l)
	})
	open(n.nic(), "no uplink")
}
