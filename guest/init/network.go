package main

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/control"
)

// nic is the name that the kernel gives to the first interface.
const nic = "eth0"

// configureNetwork sets lo up, and eth0 if the guest has addresses.
func configureNetwork(s control.Settings) error {
	if err := setUp("lo"); err != nil {
		return err
	}
	if len(s.Addresses) == 0 {
		return nil
	}
	if err := waitFor("network interface "+nic, func() bool {
		_, err := netlink.LinkByName(nic)
		return err == nil
	}); err != nil {
		return err
	}
	// The addresses are the guest's by decree: no time is spent on asking
	// whether they are taken, nor on router advertisements.
	for _, key := range []string{"accept_dad", "accept_ra"} {
		if err := setSysctl("net/ipv6/conf/"+nic+"/"+key, "0"); err != nil {
			return fmt.Errorf("network: %w", err)
		}
	}
	if err := setUp(nic); err != nil {
		return err
	}
	link, err := netlink.LinkByName(nic)
	if err != nil {
		return fmt.Errorf("network: %s: %w", nic, err)
	}
	for _, a := range s.Addresses {
		addr := &netlink.Addr{
			IPNet: &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())},
			Flags: unix.IFA_F_NODAD,
		}
		if err := netlink.AddrAdd(link, addr); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("network: address %s: %w", a, err)
		}
	}
	for _, g := range s.Gateways {
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: g.AsSlice()}
		if err := netlink.RouteAdd(route); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("network: gateway %s: %w", g, err)
		}
	}
	return nil
}

func setUp(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("network: %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("network: set %s up: %w", name, err)
	}
	return nil
}
