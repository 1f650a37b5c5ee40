package qemu

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/vishvananda/netlink"
)

// tapName is the tap of a guest's card: the same on every host and short
// enough for a network interface (15 bytes).
func tapName(uuid string, index int) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s/%d", uuid, index))
	return fmt.Sprintf("lmt%x", sum[:5])
}

// checkBridge says whether the host has a bridge of this name.
func (d *Driver) checkBridge(name string) (netlink.Link, error) {
	link, err := d.links.LinkByName(name)
	var missing netlink.LinkNotFoundError
	switch {
	case errors.As(err, &missing):
		return nil, fmt.Errorf("there is no bridge %s on this host; create it, or name another one in the definition", name)
	case err != nil:
		return nil, fmt.Errorf("look for bridge %s: %w", name, err)
	case link.Type() != "bridge":
		return nil, fmt.Errorf("the network interface %s is a %s, not a bridge; name a bridge in the definition", name, link.Type())
	}
	return link, nil
}

// createTaps makes a tap for each card, a port of its bridge. They go away by
// themselves when the last descriptor is closed: QEMU inherits it and the
// caller closes its own. A tap that is not up carries nothing yet.
func (d *Driver) createTaps(def *Definition, up bool) (taps []*os.File, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, closeAll(taps))
			taps = nil
		}
	}()
	for i := range def.NICs {
		tap, err := d.createTap(def, i, up)
		if err != nil {
			return taps, fmt.Errorf("network card %d: %w", i, err)
		}
		taps = append(taps, tap)
	}
	return taps, nil
}

func (d *Driver) createTap(def *Definition, i int, up bool) (*os.File, error) {
	nic := &def.NICs[i]
	bridge, err := d.checkBridge(nic.Bridge)
	if err != nil {
		return nil, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = tapName(def.UUID, i)
	tap := &netlink.Tuntap{
		LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP, NonPersist: true, Queues: 1,
		Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR | netlink.TUNTAP_ONE_QUEUE,
	}
	if err := d.links.LinkAdd(tap); err != nil {
		return nil, fmt.Errorf("create tap %s: %w", attrs.Name, err)
	}
	fd := tap.Fds[0]
	if err := d.plugTap(attrs.Name, bridge, tapAddress(), up); err != nil {
		return nil, errors.Join(err, fd.Close())
	}
	return fd, nil
}

// tapAddress makes up a hardware address. A bridge takes the lowest one of its
// ports for its own, so it is a high one; where the bridge takes it all the same,
// it must not be that of a tap on another host, such as the one that the guest
// comes from.
func tapAddress() net.HardwareAddr {
	mac := net.HardwareAddr{0xfe, 0xff, 0, 0, 0, 0}
	_, _ = rand.Read(mac[2:]) // never fails
	return mac
}

// plugTap makes a tap a port of a bridge, whose MTU it gets, since a bridge takes
// the lowest of its ports'.
func (d *Driver) plugTap(name string, bridge netlink.Link, mac net.HardwareAddr, up bool) error {
	link, err := d.links.LinkByName(name)
	if err != nil {
		return fmt.Errorf("tap %s: %w", name, err)
	}
	if err := d.links.LinkSetHardwareAddr(link, mac); err != nil {
		return fmt.Errorf("tap %s: set the address: %w", name, err)
	}
	if err := d.links.LinkSetMTU(link, bridge.Attrs().MTU); err != nil {
		return fmt.Errorf("tap %s: set the MTU of bridge %s: %w", name, bridge.Attrs().Name, err)
	}
	if err := d.links.LinkSetMaster(link, bridge); err != nil {
		return fmt.Errorf("tap %s: make it a port of bridge %s: %w", name, bridge.Attrs().Name, err)
	}
	if !up {
		return nil
	}
	return d.raiseTap(name)
}

func (d *Driver) raiseTap(name string) error {
	link, err := d.links.LinkByName(name)
	if err != nil {
		return fmt.Errorf("tap %s: %w", name, err)
	}
	if err := d.links.LinkSetUp(link); err != nil {
		return fmt.Errorf("tap %s: set it up: %w", name, err)
	}
	return nil
}

// lowerTap takes a tap out of the network without removing it.
func (d *Driver) lowerTap(name string) error {
	link, err := d.links.LinkByName(name)
	if err != nil {
		return fmt.Errorf("tap %s: %w", name, err)
	}
	if err := d.links.LinkSetDown(link); err != nil {
		return fmt.Errorf("tap %s: set it down: %w", name, err)
	}
	return nil
}

func closeAll(list []*os.File) error {
	var errs []error
	for _, f := range list {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}
