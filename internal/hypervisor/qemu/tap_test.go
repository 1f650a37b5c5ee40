package qemu

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/lmctl/lmctl/internal/testenv"
)

// newBridge makes a bridge in the tests' own network namespace.
func newBridge(t *testing.T, name string, mtu int) *netlink.Bridge {
	t.Helper()
	testenv.NeedRoot(t)
	if os.Getenv(inNamespace) == "" {
		testenv.Missing(t, "a network namespace", errors.New("the tests are not in one of their own"))
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = name, mtu
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	if err := netlink.LinkAdd(bridge); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netlink.LinkDel(bridge); err != nil {
			t.Error(err)
		}
	})
	if err := netlink.LinkSetUp(bridge); err != nil {
		t.Fatal(err)
	}
	return bridge
}

func tapOf(t *testing.T, g *flatGuest) netlink.Link {
	t.Helper()
	link, err := netlink.LinkByName(tapName(g.uuid, 0))
	if err != nil {
		t.Fatal(err)
	}
	return link
}

func isUp(l netlink.Link) bool { return l.Attrs().Flags&net.FlagUp != 0 }

func noTap(t *testing.T, g *flatGuest) {
	t.Helper()
	_, err := netlink.LinkByName(tapName(g.uuid, 0))
	if !errors.As(err, new(netlink.LinkNotFoundError)) {
		t.Errorf("the tap is left: %v", err)
	}
}

func TestTap(t *testing.T) {
	bridge := newBridge(t, "lmtestbr0", 1400)
	h := newHost(t)
	g := newFlatGuest(t, AcceleratorTCG, "nics:\n- bridge: lmtestbr0\n  mac: 52:54:00:aa:bb:cc\n  addresses: [192.0.2.7]\n")
	h.startFlat(t, g)
	tap := tapOf(t, g)
	a := tap.Attrs()
	if a.MasterIndex != bridge.Attrs().Index || !isUp(tap) || a.MTU != 1400 || !strings.HasPrefix(a.HardwareAddr.String(), "fe:ff:") {
		t.Errorf("the tap is %+v", a)
	}
	h.restart(t) // it stays
	if !isUp(tapOf(t, g)) {
		t.Error("the tap is down after the agent came back")
	}
	// A suspended guest keeps its tap, so that what arrives is not lost.
	src := h.source(t, g.name)
	if _, err := src.Suspend(testContext(t), new(brokenWriter)); err != nil {
		t.Fatal(err)
	}
	if !isUp(tapOf(t, g)) {
		t.Error("the tap of a suspended guest is down")
	}
	if err := errors.Join(src.Resume(testContext(t)), src.Close()); err != nil {
		t.Fatal(err)
	}
	if err := h.Destroy(testContext(t), g.name); err != nil {
		t.Fatal(err)
	}
	noTap(t, g)
}

// A shell's tap is in its bridge but down until the guest runs.
func TestShellTap(t *testing.T) {
	newBridge(t, "lmtestbr1", 1500)
	here, there := newHost(t), newHost(t)
	g := newFlatGuest(t, AcceleratorTCG, "")
	here.startFlat(t, g)
	src := here.source(t, g.name)
	// On one machine both ends would have the same tap: only the shell has one.
	offer := alter(t, offerOf(t, src), func(b *bundle) {
		b.Definition += "nics: [{bridge: lmtestbr1, mac: '52:54:00:aa:bb:cd', addresses: [192.0.2.7]}]\n"
	})
	shell := there.shell(t, offer)
	if tap := tapOf(t, g); isUp(tap) || tap.Attrs().MasterIndex == 0 {
		t.Errorf("the shell's tap is %+v", tap.Attrs())
	}
	if err := there.raiseTap(tapName(g.uuid, 0)); err != nil {
		t.Fatal(err)
	}
	if err := there.lowerTap(tapName(g.uuid, 0)); err != nil || isUp(tapOf(t, g)) {
		t.Errorf("lower the tap: %v", err)
	}
	if _, err := shell.Announce(testContext(t)); err == nil || !strings.Contains(err.Error(), "announce guest flat") {
		t.Errorf("announce a guest behind a tap that is down: %v", err)
	}
	if err := shell.Destroy(testContext(t)); err != nil {
		t.Fatal(err)
	}
	noTap(t, g)
	there.empty(t)
}

// A QEMU that is killed while nobody watches takes its tap along.
func TestTapGoesWithQEMU(t *testing.T) {
	newBridge(t, "lmtestbr2", 1500)
	h := newHost(t)
	g := newFlatGuest(t, AcceleratorTCG, "nics: [{bridge: lmtestbr2}]\n")
	h.startFlat(t, g)
	v, err := h.lookup(g.name)
	if err != nil {
		t.Fatal(err)
	}
	sendSignal(t, v.inst, 9)
	h.ended(t, g.name, g.uuid)
	noTap(t, g)
	// And a start that fails takes it away too.
	bad := fmt.Sprintf("name: bad\nmemory: 1MiB\naccelerator: tcg\nnics: [{bridge: lmtestbr2, mac: '52:54:00:00:00:02'}]\nuuid: %s\nextra-arguments: [-device, nonsense]\n", "01234567-89ab-cdef-0123-456789abcdef")
	if _, err := h.Define([]byte(bad)); err != nil {
		t.Fatal(err)
	}
	if err := h.Start(testContext(t), "bad"); err == nil {
		t.Fatal("started with a device that does not exist")
	}
	noTap(t, &flatGuest{uuid: "01234567-89ab-cdef-0123-456789abcdef"})
}
