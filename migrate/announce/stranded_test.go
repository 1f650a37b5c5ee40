package announce

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	ipUDP = 17
	ipTCP = 6
)

// strand opens the stranded frames at the source, on a duplicate of the guest's
// descriptor, as a caller gets it with pidfd_getfd.
func (n *network) strand(t *testing.T) *Stranded {
	t.Helper()
	var fd int
	raw, err := n.old.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if e := raw.Control(func(own uintptr) { fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0) }); e != nil || err != nil {
		t.Fatal(e, err)
	}
	var s *Stranded
	n.source.must(func() (err error) {
		s, err = OpenStranded(n.nic(guest4), fd)
		return err
	})
	return s
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
	n.guestAtSource(t)
	const before, after = 20, 40
	n.datagrams(0, before)
	n.client.send("eth0", unhex(t, hexARPOther), false) // a broadcast, not to be sent on
	s := n.strand(t)
	n.moveGuest(t)
	seen := n.destination.listen("up0")

	// What is there is sent on even with no time left.
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	eventually(t, "all frames sent on", func() bool { // some may be on their way to the queue
		sent, err := s.Forward(gone)
		if err != nil || sent > before {
			t.Fatalf("%d frames sent on, want %d; %v", sent, before, err)
		}
		return sent == before
	})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	n.datagrams(before, after) // which find their own way
	bridge := n.source.mac("br0")
	for i := range after {
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
	raw, err := n.old.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	e := raw.Control(func(fd uintptr) { err = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, 1|2) })
	if e != nil || err != nil {
		t.Fatal(e, err)
	}
	n.guestAtSource(t)
	data := bytes.Repeat([]byte("0123456789"), 250)
	n.client.send("eth0", segment(n.client.mac("eth0"), data, 1000), true)
	s := n.strand(t)
	n.moveGuest(t)
	done, cancel := context.WithCancel(t.Context())
	cancel()
	// The frame may still be on its way to the queue.
	eventually(t, "the segment", func() bool {
		sent, err := s.Forward(done)
		if err != nil {
			t.Fatal(err)
		}
		return sent == 1
	})
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
	if err := s.Close(); err != nil {
		t.Fatal(err)
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
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestStrandedBounded(t *testing.T) {
	n := newNetwork(t, 0)
	n.guestAtSource(t)
	s := n.strand(t)
	defer s.Close()
	s.limit = 5
	frame := append(append(bytes.Clone(guestMAC), otherMAC...), make([]byte, 50)...)
	for range 9 {
		n.source.send("tap0", frame, false)
	}
	sent, err := s.Forward(t.Context())
	if sent != 5 || !errors.Is(err, ErrTooMany) {
		t.Errorf("sent on %d, want 5; %v", sent, err)
	}
}

func TestOpenStrandedRefuses(t *testing.T) {
	n := newNetwork(t, 0)
	file, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	dup := func(f *os.File) int {
		raw, err := f.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		fd := -1
		if err := raw.Control(func(own uintptr) { fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	other := n.nic(guest4)
	other.Tap = "tap9"
	second := n.source.tap("tap1", 0)
	lonely := n.nic(guest4)
	lonely.Tap = "tap1"
	tests := []struct {
		want string
		nic  NIC
		fds  []int
	}{
		{"no descriptor", n.nic(), nil},
		{"descriptor -1", n.nic(), []int{-1}},
		{"TUNGETIFF", n.nic(), []int{dup(file)}},
		{"is of tap0", other, []int{dup(n.old)}},
		{"not a port of br0", lonely, []int{dup(second)}},
	}
	for _, tt := range tests {
		n.source.must(func() error {
			s, err := OpenStranded(tt.nic, tt.fds...)
			if s != nil || err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, %v; want %q", s, err, tt.want)
			}
			for _, fd := range tt.fds {
				if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
					t.Errorf("%s: descriptor %d is still open", tt.want, fd)
				}
			}
			return nil
		})
	}
	// Without an uplink nothing can be sent on.
	n.source.must(func() error {
		l, err := netlink.LinkByName("up0")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetNoMaster(l); err != nil {
			return err
		}
		if _, err := OpenStranded(n.nic(), dup(n.old)); err == nil || !strings.Contains(err.Error(), "no uplink") {
			t.Errorf("no uplink: %v", err)
		}
		return nil
	})
}

func TestTapFDs(t *testing.T) {
	s := newSpace(t)
	const name = "lmtest-tap"
	f := s.tap(name, 0)
	fds, err := TapFDs(os.Getpid(), name)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		if len(fds) != 1 || fds[0] != int(fd) {
			t.Errorf("descriptors %v, want %d", fds, fd)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := TapFDs(os.Getpid(), "lmtest-none"); err == nil {
		t.Error("a tap that is not there: no error")
	}
	if _, err := TapFDs(1<<30, name); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no process: %v", err)
	}
}
