package labtest

import (
	"fmt"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
)

// Settled waits until the agents agree on where a guest is, and returns the host
// that runs it, or the one where it has ended, which judge allows or does not. It
// is asked about the guest of each host too that has it and is not busy with it,
// and says what is yet to come.
func (c *Cluster) Settled(guest string, judge func(host string, g *lmctlv1.Guest) error, mayEnd func(host string) bool) (runs, ended string) {
	c.T.Helper()
	c.Eventually("both hosts settle", func() error {
		var running, over []string
		for _, h := range c.Lab.Hosts() {
			g, err := c.Guest(h, guest)
			if err == nil && g != nil {
				err = busy(h, g)
			}
			if err == nil && g != nil {
				err = judge(h, g)
			}
			switch {
			case err != nil:
				return err
			case g == nil:
			case g.State == "running":
				running = append(running, h)
			case g.State == "stopped":
				over = append(over, h)
			default:
				return fmt.Errorf("the guest is %s on %s: %s", g.State, h, g.Advice)
			}
		}
		switch {
		case len(running) == 1 && len(over) == 0:
			runs = running[0]
			return nil
		case len(running) == 0 && len(over) == 1 && mayEnd(over[0]):
			ended = over[0]
			return nil
		}
		return fmt.Errorf("running on %q, ended on %q", running, over)
	})
	return runs, ended
}

// busy is an error as long as a host does something with a guest.
func busy(host string, g *lmctlv1.Guest) error {
	if g.Busy == "" && g.Migration == "" {
		return nil
	}
	return fmt.Errorf("it is busy on %s: %s %s", host, g.Busy, g.Migration)
}

// GiveUp cancels a migration that may still be under way, and waits until no host
// does anything with its guest any more.
func (c *Cluster) GiveUp(guest, id string) {
	c.T.Helper()
	// It may have ended long ago, or with its agent.
	_, _ = c.Clients["host1"].Migrations.Cancel(c.Context(), &lmctlv1.MigrationRequest{Id: id})
	err := poll(func() error {
		for _, h := range c.Lab.Hosts() {
			g, err := c.Guest(h, guest)
			if err == nil && g != nil {
				err = busy(h, g)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		c.T.Errorf("guest %s: %v", guest, err)
	}
}
