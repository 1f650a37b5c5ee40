package announce

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/testenv"
)

func TestMain(m *testing.M) {
	fd, err := stamping()
	if err != nil {
		fmt.Fprintln(os.Stderr, "have the kernel take the time of frames:", err)
		os.Exit(1)
	}
	defer unix.Close(fd)
	goleak.VerifyTestMain(m)
}

// stamping returns a socket that has the kernel take the time of every frame,
// once it does: it begins some while after it was asked. Guests have a Learner
// that does the same.
func stamping() (fd int, err error) {
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	self, err := unix.Getsockname(fd)
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPING_NEW, stamps)
	}
	b, oob := make([]byte, 1), make([]byte, 128)
	for err == nil {
		if err = unix.Sendto(fd, b, 0, self); err != nil {
			break
		}
		var n int
		if _, n, _, _, err = unix.Recvmsg(fd, b, oob, 0); err == nil && n > 0 {
			return fd, nil
		}
	}
	return -1, errors.Join(err, unix.Close(fd))
}

var (
	guestMAC = net.HardwareAddr{0x52, 0x54, 0x00, 0x12, 0x34, 0x56}
	otherMAC = net.HardwareAddr{0x52, 0x54, 0x00, 0xaa, 0xbb, 0xcc}
	guest4   = netip.MustParseAddr("192.0.2.10")
	guest6   = netip.MustParseAddr("2001:db8::10")
	client4  = netip.MustParseAddr("192.0.2.1")
)

// space is a network namespace without a name: it is gone with its handle.
type space struct {
	t  *testing.T
	ns netns.NsHandle
}

func newSpace(t *testing.T) space {
	t.Helper()
	testenv.NeedRoot(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	ns, err := netns.New()
	if errors.Is(err, unix.EPERM) {
		testenv.Missing(t, "CAP_SYS_ADMIN for network namespaces", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := netns.Set(home); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return space{t, ns}
}

// do runs f in the namespace. f may not end the test.
func (s space) do(f func() error) error {
	result := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		if err := netns.Set(s.ns); err != nil {
			result <- err
			return
		}
		result <- f()
	}()
	return <-result
}

func (s space) must(f func() error) {
	s.t.Helper()
	if err := s.do(f); err != nil {
		s.t.Fatal(err)
	}
}

func (s space) sysctl(path, value string) {
	s.t.Helper()
	s.must(func() error { return os.WriteFile("/proc/sys/net/"+path, []byte(value), 0) })
}

// addBridge makes a bridge that says nothing of its own accord.
func (s space) addBridge(name string, vlans bool) error {
	s.t.Helper()
	s.sysctl("ipv6/conf/default/disable_ipv6", "1")
	return s.do(func() error {
		snooping := false
		b := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs(), MulticastSnooping: &snooping}
		b.Name = name
		if vlans { // a kernel that has none refuses the word itself
			b.VlanFiltering = &vlans
		}
		if err := netlink.LinkAdd(b); err != nil {
			return err
		}
		return netlink.LinkSetUp(b)
	})
}

func (s space) bridge(name string) {
	s.t.Helper()
	if err := s.addBridge(name, false); err != nil {
		s.t.Fatal(err)
	}
}

// wire joins interface a of s and b of peer.
func (s space) wire(a string, peer space, b string) {
	s.t.Helper()
	s.must(func() error {
		v := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: b, PeerNamespace: netlink.NsFd(int(peer.ns))}
		v.Name = a
		return errors.Join(netlink.LinkAdd(v), netlink.LinkSetUp(v))
	})
	peer.must(func() error { return up(b) })
}

func up(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

func (s space) enslave(port, bridge string) {
	s.t.Helper()
	s.must(func() error {
		p, err := netlink.LinkByName(port)
		if err != nil {
			return err
		}
		b, err := netlink.LinkByName(bridge)
		if err != nil {
			return err
		}
		return netlink.LinkSetMaster(p, b)
	})
}

// tap makes a tap that is up and returns the guest's side of it.
func (s space) tap(name string, flags uint16) *os.File {
	s.t.Helper()
	var f *os.File
	s.must(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), name)
		ifr, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | flags)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
			return err
		}
		// So that nothing registers its reading end before it is attached.
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return err
		}
		f.Close()
		f = os.NewFile(uintptr(dup), name)
		return up(name)
	})
	s.t.Cleanup(func() { f.Close() })
	return f
}

func (s space) index(name string) (index int) {
	s.t.Helper()
	s.must(func() error {
		i, err := net.InterfaceByName(name)
		if err == nil {
			index = i.Index
		}
		return err
	})
	return index
}

// send puts a frame onto an interface.
func (s space) send(name string, b []byte, offload bool) {
	s.t.Helper()
	index := s.index(name)
	s.must(func() error {
		o, err := openOutlet(offload)
		if err != nil {
			return err
		}
		return errors.Join(o.send(context.Background(), index, b), o.close())
	})
}

// fdb lists where the bridge's entries for mac point: port to state.
func (s space) fdb(bridge string, mac net.HardwareAddr) map[string]int {
	s.t.Helper()
	found := make(map[string]int)
	s.must(func() error {
		entries, err := netlink.NeighList(0, unix.AF_BRIDGE)
		if err != nil {
			return err
		}
		b, err := netlink.LinkByName(bridge)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if bytes.Equal(e.HardwareAddr, mac) && e.MasterIndex == b.Attrs().Index {
				l, err := netlink.LinkByIndex(e.LinkIndex)
				if err != nil {
					return err
				}
				found[l.Attrs().Name] = e.State
			}
		}
		return nil
	})
	return found
}

// listen opens a packet socket that sees all that arrives at an interface.
func (s space) listen(name string) *packet.Conn {
	s.t.Helper()
	var c *packet.Conn
	s.must(func() error {
		ifi, err := net.InterfaceByName(name)
		if err != nil {
			return err
		}
		if c, err = packet.Listen(ifi, packet.Raw, unix.ETH_P_ALL, nil); err != nil {
			return err
		}
		return c.SetPromiscuous(true)
	})
	s.t.Cleanup(func() { c.Close() })
	return c
}

// next reads frames from c until one is from mac.
func next(t *testing.T, c *packet.Conn, mac net.HardwareAddr) []byte {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 65536)
	for {
		n, _, err := c.ReadFrom(b)
		if err != nil {
			t.Fatal(err)
		}
		if n >= offIP && bytes.Equal(b[offSource:offType], mac) {
			return b[:n]
		}
	}
}

// receive reads one frame from the guest's side of a tap, waiting for it.
func receive(t *testing.T, f *os.File) []byte {
	t.Helper()
	if err := f.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 70000)
	n, err := f.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: did not happen", what)
		}
		time.Sleep(time.Millisecond) // the kernel tells nobody when it has done with a frame
	}
}

// network is two hosts and a client on a switch. The guest's taps are ports of
// the hosts' bridges.
type network struct {
	sw, source, destination, client space
	old, new                        *os.File // the guest's side of its taps
}

// newNetwork: flags are those of the source's tap.
func newNetwork(t *testing.T, flags uint16) *network {
	t.Helper()
	n := &network{sw: newSpace(t), source: newSpace(t), destination: newSpace(t), client: newSpace(t)}
	n.sw.bridge("sw")
	for i, h := range []space{n.source, n.destination} {
		name := []string{"source", "destination"}[i]
		h.bridge("br0")
		n.sw.wire(name, h, "up0")
		n.sw.enslave(name, "sw")
		h.enslave("up0", "br0")
	}
	n.old, n.new = n.source.tap("tap0", flags), n.destination.tap("tap0", 0)
	n.source.enslave("tap0", "br0")
	n.destination.enslave("tap0", "br0")
	n.client.sysctl("ipv6/conf/default/accept_dad", "0")
	n.sw.wire("client", n.client, "eth0")
	n.sw.enslave("client", "sw")
	n.client.must(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		var errs []error
		for _, a := range []string{"192.0.2.1/24", "2001:db8::1/64"} {
			addr, err := netlink.ParseAddr(a)
			errs = append(errs, err, netlink.AddrAdd(l, addr))
		}
		return errors.Join(errs...)
	})
	return n
}

func (n *network) nic(addrs ...netip.Addr) NIC {
	return NIC{Bridge: "br0", Tap: "tap0", MAC: guestMAC, Addresses: addrs}
}

// guestAtSource has the whole network know the guest at the source.
func (n *network) guestAtSource(t *testing.T) {
	t.Helper()
	f, err := reverseRequest(n.nic())
	if err != nil {
		t.Fatal(err)
	}
	b, err := f.bytes(0)
	if err != nil {
		t.Fatal(err)
	}
	header := 0
	raw, err := n.old.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if e := raw.Control(func(fd uintptr) {
		var ifr *unix.Ifreq
		if ifr, err = unix.NewIfreq(""); err != nil {
			return
		}
		if err = unix.IoctlIfreq(int(fd), unix.TUNGETIFF, ifr); err != nil || ifr.Uint16()&unix.IFF_VNET_HDR == 0 {
			return
		}
		header, err = unix.IoctlGetInt(int(fd), unix.TUNGETVNETHDRSZ)
	}); e != nil || err != nil {
		t.Fatal(e, err)
	}
	if _, err := n.old.Write(append(make([]byte, header), b...)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the guest known at the source", func() bool {
		_, s := n.sw.fdb("sw", guestMAC)["source"]
		_, d := n.destination.fdb("br0", guestMAC)["up0"]
		return s && d
	})
}

// sum is the ones' complement sum of RFC 1071 over several parts, of which all
// but the last are of even length.
func sum(parts ...[]byte) uint16 {
	var n uint32
	for _, b := range parts {
		for ; len(b) > 1; b = b[2:] {
			n += uint32(b[0])<<8 | uint32(b[1])
		}
		if len(b) == 1 {
			n += uint32(b[0]) << 8
		}
	}
	for n>>16 != 0 {
		n = n&0xffff + n>>16
	}
	return uint16(n)
}

var noRepeats = []time.Duration{}
