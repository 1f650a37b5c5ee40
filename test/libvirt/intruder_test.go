package libvirt

import (
	"testing"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/lab/domain"
	"github.com/lmctl/lmctl/migrate"
	"github.com/lmctl/lmctl/test/labtest"
)

// A copy that another hand has run at the destination before the guest was handed
// over is ended when it is not: the guest is the copy at the source.
func TestResumedTooEarly(t *testing.T) {
	c := newCluster(t).showing(t)
	g := c.start(flatSpec("too-early", domain.Shape{}))
	defer c.remove(g)
	stop := c.Hold(labtest.Point{Role: "destination", State: migrate.DestReady})
	defer c.Release(stop)
	id, err := c.Begin(g.Name, "host1", "host2", &lmctlv1.MigrationOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c.Reached(stop)
	c.virsh("host2", "resume", g.Name)
	if _, err := c.Clients["host1"].Migrations.Cancel(t.Context(), &lmctlv1.MigrationRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
	c.Release(stop)
	if r, err := c.Wait("host1", id); err != nil || r.Result != migrate.Cancelled {
		t.Fatalf("cancelled: %+v, %v", r, err)
	}
	c.known(g, "host1")
	c.healthy(g, "host1")
	c.nothingLeft(g, "host1")
}

// A guest that another hand brings is not taken for the shell of a migration that
// an agent was receiving when it died.
func TestBroughtInstead(t *testing.T) {
	c := newCluster(t).showing(t)
	g := c.start(flatSpec("instead", domain.Shape{}))
	defer c.remove(g)
	stop := c.Hold(labtest.Point{Role: "destination", State: migrate.DestReceiving})
	defer c.Release(stop)
	id, err := c.Begin(g.Name, "host1", "host2", &lmctlv1.MigrationOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c.Reached(stop)
	if err := c.Lab.KillAgent(c.Context(), "host2"); err != nil {
		t.Fatal(err)
	}
	c.Release(stop)
	if r, err := c.Wait("host1", id); err != nil || r.Result == migrate.Completed || r.Error == "" {
		t.Fatalf("without the destination's agent: %+v, %v", r, err)
	}
	c.Eventually("virsh takes it to host2, once libvirt has ended the shell there", func() error {
		_, err := c.Lab.Output(c.Context(), "host1", "virsh", "migrate", "--live", "--unsafe", "--persistent", "--undefinesource",
			g.Name, "qemu+tcp://host2/system")
		return err
	})
	c.startDaemon("host2", lab.Agent)
	c.known(g, "host2")
	c.healthy(g, "host2")
	c.nothingLeft(g, "host2")
}
