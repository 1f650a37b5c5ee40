package libvirt

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
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

// forget starts a guest and moves it to host2, where libvirt forgets it when it cannot
// write its definition. It returns what is in the way of that.
func (c *cluster) forget(name string) (g lab.Guest, inTheWay string) {
	c.T.Helper()
	g = c.start(flatSpec(name, domain.Shape{}))
	inTheWay = c.Lab.Outside("host2", "/etc/libvirt/qemu/"+name+".xml.new")
	if err := os.MkdirAll(inTheWay, 0o700); err != nil {
		c.T.Fatal(err)
	}
	c.move(g, "host1", "host2")
	c.Eventually("the agent says that it cannot be reached", func() error { return c.forgotten(g) })
	return g, inTheWay
}

// forgotten is an error unless the agent says that libvirt has forgotten a guest.
func (c *cluster) forgotten(g lab.Guest) error {
	info, err := c.Clients["host2"].Guests.Show(c.T.Context(), &lmctlv1.GuestRequest{Name: g.Name})
	if err == nil && (info.State != "unreachable" || !strings.Contains(info.Runstate, "restart libvirtd")) {
		err = fmt.Errorf("it is %v", info)
	}
	return err
}

// staysForgotten waits until the agent has looked at a guest again: it tells of each
// look, and the second that is told of has begun after the first was.
func (c *cluster) staysForgotten(g lab.Guest) {
	c.T.Helper()
	events, err := c.Clients["host2"].Guests.Watch(c.Context(), &lmctlv1.WatchGuestsRequest{Name: g.Name})
	for n := 0; err == nil && n < 3; n++ { // the first event is how it is
		var e *lmctlv1.GuestEvent
		if e, err = events.Recv(); err == nil && (e.Removed || e.Guest.GetState() != "unreachable") {
			err = fmt.Errorf("look %d: it is %v", n, e)
		}
	}
	if err != nil {
		c.T.Error(err)
	}
}

// A guest that libvirt forgets, and whose QEMU runs on, is not made a second time: it
// is there, as one that cannot be reached, until the next libvirtd finds it again.
func TestForgotten(t *testing.T) {
	c := newCluster(t).showing(t)
	g, inTheWay := c.forget("forgotten")
	defer c.remove(g)
	here := c.Clients["host2"].Guests
	info, err := here.Show(t.Context(), &lmctlv1.GuestRequest{Name: g.Name})
	if err != nil || len(info.Definition) == 0 {
		t.Errorf("its definition: %v, %v", info, err)
	}
	// The next agent knows no more than libvirt does, but for what this one wrote.
	if err := c.Lab.KillAgent(c.Context(), "host2"); err != nil {
		t.Fatal(err)
	}
	if err := c.Lab.StartAgent(c.Context(), "host2"); err != nil {
		t.Fatal(err)
	}
	c.Eventually("the next agent says so, too", func() error { return c.forgotten(g) })
	if known := c.virsh("host2", "list", "--all", "--name"); strings.Contains(known, g.Name) {
		t.Errorf("libvirt knows %q", known)
	}
	if _, err := here.Define(t.Context(), &lmctlv1.DefineRequest{Definition: info.GetDefinition()}); err == nil {
		t.Error("it was defined beside itself")
	}
	if err := os.Remove(inTheWay); err != nil {
		t.Fatal(err)
	}
	// Another hand is not kept from it, and is not followed either.
	file := filepath.Join(c.Lab.HostDir("host2"), g.Name+".xml")
	if err := os.WriteFile(file, info.GetDefinition(), 0o600); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(file)
	c.virsh("host2", "define", file)
	c.staysForgotten(g)
	if _, err := here.Start(t.Context(), &lmctlv1.GuestRequest{Name: g.Name}); err == nil {
		t.Error("it was started beside itself")
	}
	if _, err := here.Undefine(t.Context(), &lmctlv1.GuestRequest{Name: g.Name}); err == nil {
		t.Error("it was undefined while it runs")
	}
	if err := c.forgotten(g); err != nil {
		t.Error(err)
	}
	if pids := c.processes(g); len(pids) != 1 {
		t.Errorf("processes %v of it", pids)
	}
	c.restartLibvirtd("host2")
	c.known(g, "host2")
	c.persistent(g, "host2")
	c.healthy(g, "host2")
	c.nothingLeft(g, "host2")
}

// A guest that libvirt has forgotten and that ends is defined then, and can be started.
func TestForgottenEnds(t *testing.T) {
	c := newCluster(t).showing(t)
	g, inTheWay := c.forget("forgotten-ends")
	defer c.remove(g)
	if err := os.Remove(inTheWay); err != nil {
		t.Fatal(err)
	}
	c.killQEMU(g, "host2")
	c.persistent(g, "host2")
	c.Eventually("it is this host's, and stopped", func() error {
		info, err := c.Guest("host2", g.Name)
		if err == nil && (info == nil || info.State != "stopped" || info.Ownership.GetState() != "owned") {
			err = fmt.Errorf("it is %v", info)
		}
		return err
	})
	// Libvirt leaves the memory file of one that it has forgotten.
	left, err := filepath.Glob(filepath.Join(c.Lab.MemoryDir("host2"), "libvirt", "qemu", "*-"+g.Name))
	if err != nil || len(left) != 1 {
		t.Fatalf("memory left: %q, %v", left, err)
	}
	if err := os.RemoveAll(left[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Clients["host2"].Guests.Start(t.Context(), &lmctlv1.GuestRequest{Name: g.Name}); err != nil {
		t.Fatal(err)
	}
	c.Eventually("it boots", func() error {
		v, err := c.Lab.CheckGuest(c.Context(), g.Name)
		if err == nil && !v.OK {
			err = fmt.Errorf("on %s: %q", v.Host, v.Problems)
		}
		return err
	})
	c.nothingLeft(g, "host2")
}

// persistent waits until a host's libvirt has a definition of a guest.
func (c *cluster) persistent(g lab.Guest, host string) {
	c.T.Helper()
	c.Eventually("it is defined", func() error {
		if known := c.virsh(host, "list", "--all", "--persistent", "--name"); !slices.Contains(strings.Fields(known), g.Name) {
			return fmt.Errorf("defined are %q", known)
		}
		return nil
	})
}
