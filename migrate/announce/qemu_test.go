package announce

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/testenv"
)

// The frames in the tap of a real QEMU whose guest is stopped, taken through a
// duplicate of QEMU's own descriptor.
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
	var fds []int
	var err error
	eventually(t, "QEMU's tap", func() bool {
		fds, err = TapFDs(cmd.Process.Pid, tap)
		return err == nil
	})
	n.source.must(func() error { return up(tap) })
	n.source.enslave(tap, "br0")
	nic := n.nic(guest4)
	nic.Tap = tap
	n.source.must(func() error { return Redirect(nic) })

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

	pidfd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, fds[0], 0)
	if err != nil {
		t.Fatal(err)
	}
	var s *Stranded
	n.source.must(func() error {
		s, err = OpenStranded(nic, fd)
		return err
	})
	done, cancel := context.WithCancel(t.Context())
	cancel()
	// A stopped QEMU still reads one frame, which it then keeps to itself, and
	// reads no more.
	sent, err := s.Forward(done)
	if err != nil || sent < count-1 || sent > count {
		t.Fatalf("%d of %d frames sent on; %v; QEMU said %q", sent, count, err, said.String())
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	last := -1
	for range sent {
		var i int
		for b := []byte(nil); !bytes.HasPrefix(b, guestMAC); {
			b = receive(t, n.new)
			if _, err := fmt.Sscanf(string(b[offIP:]), "frame %d", &i); err != nil {
				b = nil // not one of ours
			}
		}
		if i <= last {
			t.Fatalf("frame %d after frame %d", i, last)
		}
		last = i
	}
}
