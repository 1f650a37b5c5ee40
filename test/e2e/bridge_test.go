package e2e

import (
	"errors"
	"net"
	"testing"

	"github.com/vishvananda/netlink"
)

// TestBridgeTakesTapAddress moves a guest to and fro between hosts whose bridges
// take the hardware address of whatever tap they get, as it is lower than their
// uplink's: the hosts must go on hearing each other.
func TestBridgeTakesTapAddress(t *testing.T) {
	c := newCluster(t)
	for i, host := range c.Lab.Hosts() {
		err := c.Lab.In(host, func() error {
			link, err := netlink.LinkByName("uplink")
			if err != nil {
				return err
			}
			high := net.HardwareAddr{0xfe, 0xff, 0xff, 0xff, 0xff, 0xf0 + byte(i)}
			return errors.Join(netlink.LinkSetDown(link), netlink.LinkSetHardwareAddr(link, high), netlink.LinkSetUp(link))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	g := c.startFlat("lowest", "host1", quiet, "")
	for _, host := range []string{"host1", "host2"} {
		c.move(g.name, host, other(host))
		g.goesOn(other(host))
		c.nothingLeft(g, other(host))
	}
}
