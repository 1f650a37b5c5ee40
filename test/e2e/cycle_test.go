package e2e

import (
	"testing"

	"github.com/lmctl/lmctl/guest/flat"
)

// TestBackAndForth moves a guest that writes without pause 20 times and loses
// nothing: every page is compared each time, and the guest itself checks what
// it wrote.
func TestBackAndForth(t *testing.T) {
	c := newCluster(t)
	g := c.startFlat("busy", "host1", flat.Config{Memory: 128 << 20, Pages: 20000, Rate: flat.Unbounded}, "")
	w := c.watchRunning(g)
	host := "host1"
	for range 20 {
		c.move("busy", host, other(host))
		host = other(host)
		g.goesOn(host)
	}
	w.never2()
	c.nothingLeft(g, host)
}
