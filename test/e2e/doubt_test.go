package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/migrate"
	"github.com/lmctl/lmctl/test/labtest"
)

// TestClaim cuts a migration off right after its commit, so that neither host
// may run the guest, and lets the operator decide: for the source or for the
// destination. When the hosts meet again, the decision stands and the other
// copy goes.
func TestClaim(t *testing.T) {
	for _, claimant := range []string{"host1", "host2"} {
		t.Run(claimant, func(t *testing.T) {
			c := newCluster(t)
			g := c.startFlat("doubted", "host1", quiet, "")
			w := c.watchRunning(g)
			stop := c.Hold(labtest.Point{Role: "source", State: migrate.SourceCommitted})
			id := c.start(g.name, "host1", "host2", nil)
			c.Reached(stop)
			if err := c.Lab.Cut("host2"); err != nil {
				t.Fatal(err)
			}
			c.Release(stop)
			if r := c.wait("host1", id); r.Result != migrate.InDoubt {
				t.Fatalf("%s: %s, want in-doubt", r.Result, r.Error)
			}
			for _, h := range c.Lab.Hosts() {
				c.Eventually("the guest is in doubt on "+h, func() error { return c.doubted(h, g.name) })
			}
			req := &lmctlv1.ClaimRequest{Name: g.name}
			if _, err := c.Clients[claimant].Guests.Claim(t.Context(), req); err == nil || !strings.Contains(err.Error(), "force") {
				t.Fatalf("claimed without --force: %v", err)
			}
			req.Force = true
			if _, err := c.Clients[claimant].Guests.Claim(t.Context(), req); err != nil {
				t.Fatal(err)
			}
			g.goesOn(claimant)
			if err := c.Lab.Heal("host2"); err != nil {
				t.Fatal(err)
			}
			c.nothingLeft(g, claimant)
			c.Eventually("only the claimant has the guest", func() error {
				info, err := c.Guest(other(claimant), g.name)
				if err == nil && info != nil {
					err = fmt.Errorf("it is %s on %s", info.State, other(claimant))
				}
				return err
			})
			g.goesOn(claimant)
			w.never2()
			c.move(g.name, claimant, other(claimant)) // and it can move like any other
			g.goesOn(other(claimant))
			w.never2()
		})
	}
}

// doubted says whether a host's agent calls the guest in doubt and says what
// to do.
func (c *cluster) doubted(host, name string) error {
	g, err := c.Guest(host, name)
	switch {
	case err != nil:
		return err
	case g == nil:
		return fmt.Errorf("%s knows no guest %s", host, name)
	case g.State != "in-doubt":
		return fmt.Errorf("it is %s", g.State)
	case !strings.Contains(g.Advice, "lmctl guest claim"):
		return fmt.Errorf("the advice is %q", g.Advice)
	}
	return nil
}
