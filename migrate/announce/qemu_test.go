package announce

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/lmctl/lmctl/internal/testenv"
)

// A real QEMU whose guest is stopped still takes a frame out of its tap: none is
// lost for that.
func TestStrandedInQEMU(t *testing.T) {
	qemu := testenv.NeedQEMU(t)
	n := newNetwork(t, 0)
	const tap = "tap1"
	cmd := exec.Command(qemu, "-machine", "pc,accel=tcg", "-nodefaults", "-display", "none", "-S",
		"-netdev", "tap,id=n0,script=no,downscript=no,vhost=off,ifname="+tap,
		"-device", "virtio-net-pci,netdev=n0,mac="+guestMAC.String())
	var said bytes.Buffer
	cmd.Stderr = &said
	n.source.must(cmd.Start)
	t.Cleanup(func() {
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		var killed *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &killed) {
			t.Error(err)
		}
	})
	eventually(t, "QEMU's tap", func() bool {
		return n.source.do(func() error {
			_, err := netlink.LinkByName(tap)
			return err
		}) == nil
	})
	n.source.must(func() error { return up(tap) })
	n.source.enslave(tap, "br0")
	nic := n.nic(guest4)
	nic.Tap = tap
	n.source.must(func() error { return Redirect(nic) })

	var s *Stranded
	n.source.must(func() (err error) {
		s, err = OpenStranded(nic)
		return err
	})
	defer s.Close()
	s.Stopped(time.Now()) // it has not been started

	const count = 10
	index := n.source.index(tap)
	n.source.must(func() error {
		o, err := openOutlet(false)
		if err != nil {
			return err
		}
		defer o.close()
		for i := range count {
			b := fmt.Appendf(bytes.Join([][]byte{guestMAC, otherMAC, {0x88, 0xb5}}, nil), "frame %d %46d", i, 0)
			if err := o.send(context.Background(), index, b); err != nil {
				return err
			}
		}
		return nil
	})
	n.destination.must(func() error {
		_, err := Announce(t.Context(), []NIC{n.nic(guest4)}, Options{Repeats: noRepeats})
		return err
	})

	awaitHeld(t, s, count)
	sent, err := s.Forward(past(t))
	if err != nil || sent != count {
		t.Fatalf("%d of %d frames sent on; %v; QEMU said %q", sent, count, err, said.String())
	}
	for want := range count {
		got := -1
		for got < 0 {
			b := receive(t, n.new)
			if _, err := fmt.Sscanf(string(b[offIP:]), "frame %d", &got); err != nil || !bytes.HasPrefix(b, guestMAC) {
				got = -1 // not one of ours
			}
		}
		if got != want {
			t.Fatalf("frame %d in the place of frame %d", got, want)
		}
	}
}
