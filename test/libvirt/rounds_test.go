package libvirt

import (
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/lab/domain"
	"github.com/lmctl/lmctl/migrate"
)

// rounds is how often a domain goes there by lmctl and back by virsh.
const rounds = 5

// flatSpec is a small guest that runs on host1.
func flatSpec(name string, shape domain.Shape) lab.GuestSpec {
	return lab.GuestSpec{
		Name: name, Kind: lab.Flat, Host: "host1", Memory: 64 << 20, VCPUs: 1,
		Shape: shape, WorkingSet: 8 << 20, DirtyRate: 8 << 20,
	}
}

// What lmctl has moved, virsh moves back, and again.
func TestRounds(t *testing.T) {
	c := newCluster(t)
	for name, shape := range map[string]domain.Shape{"persistent": {}, "transient": {Transient: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := c.showing(t)
			g := c.start(flatSpec(name, shape))
			defer c.remove(g)
			for range rounds {
				c.round(g)
			}
		})
	}
}

func (c *cluster) round(g lab.Guest) {
	c.T.Helper()
	persistent, autostart := "yes", "enable"
	back := []string{"migrate", "--live", "--unsafe", g.Name, "qemu+tcp://host1/system", "--persistent", "--undefinesource"}
	if g.Shape.Transient {
		persistent, autostart, back = "no", "disable", back[:5]
	} else {
		c.virsh("host1", "autostart", g.Name) // virsh does not bring it back
	}
	r := c.move(g, "host1", "host2")
	c.T.Logf("%s", words(r))
	c.healthy(g, "host2")
	c.nothingLeft(g, "host2")
	about := c.virsh("host2", "dominfo", g.Name)
	if field(about, "Persistent") != persistent || field(about, "Autostart") != autostart {
		c.T.Errorf("wanted persistent %s, autostart %s:\n%s", persistent, autostart, about)
	}
	c.virsh("host2", back...)
	c.known(g, "host1") // virsh does not wait until the agents have heard of it
	c.healthy(g, "host1")
	c.nothingLeft(g, "host1")
}

// known waits until the agents have seen where virsh has moved a guest.
func (c *cluster) known(g lab.Guest, host string) {
	c.T.Helper()
	c.Eventually("the agents follow virsh", func() error {
		for _, h := range c.Lab.Hosts() {
			info, err := c.Guest(h, g.Name)
			switch {
			case err != nil:
				return err
			case h == host && (info == nil || info.State != "running" || info.Ownership.GetState() != "owned"):
				return fmt.Errorf("on %s it is %v", h, info)
			case h != host && info != nil:
				return fmt.Errorf("%s has it: %v", h, info)
			}
		}
		return nil
	})
}

// What the destination would know nothing of keeps a guest where it is.
func TestSnapshotsAndSavesRefused(t *testing.T) {
	c := newCluster(t)
	g := c.start(flatSpec("kept", domain.Shape{Format: "qcow2"}))
	defer c.remove(g)
	refused := func(why string) {
		t.Helper()
		r, err := c.try(g.Name, "host1", "host2")
		said := fmt.Sprint(err)
		if err == nil {
			said = fmt.Sprintf("%s: %s", r.Result, r.Error)
		}
		if err == nil && r.Result == migrate.Completed || !strings.Contains(said, why) {
			t.Errorf("its migration: %s; wanted a refusal with %q", said, why)
		}
		c.healthy(g, "host1")
		c.nothingLeft(g, "host1")
	}

	c.virsh("host1", "snapshot-create-as", g.Name, "before")
	refused("1 snapshots")
	c.virsh("host1", "snapshot-delete", g.Name, "before")

	// A libvirtd that starts believes in the file.
	save := "/var/lib/libvirt/qemu/save/" + g.Name + ".save"
	if _, err := c.Lab.Output(c.Context(), "host1", "touch", save); err != nil {
		t.Fatal(err)
	}
	c.restartLibvirtd("host1")
	refused("managed save")
	c.virsh("host1", "managedsave-remove", g.Name)

	c.move(g, "host1", "host2")
	c.healthy(g, "host2")
}

// restartLibvirtd ends a host's libvirtd as an upgrade does, and waits until the
// agent has found the next.
func (c *cluster) restartLibvirtd(host string) {
	c.T.Helper()
	if err := c.Lab.SignalDaemon(c.Context(), host, lab.Libvirtd, unix.SIGTERM, true); err != nil {
		c.T.Fatal(err)
	}
	c.startDaemon(host, lab.Libvirtd)
}

// startDaemon starts a daemon and waits until the host's agent, if it runs, has
// what it says of its guests.
func (c *cluster) startDaemon(host string, d lab.Daemon) {
	c.T.Helper()
	if err := c.Lab.StartDaemon(c.Context(), host, d); err != nil {
		c.T.Fatal(err)
	}
	if runs, err := c.Lab.DaemonRuns(host, lab.Libvirtd); err != nil {
		c.T.Fatal(err)
	} else if !runs {
		return // the agent has nobody to ask yet
	}
	c.Eventually("the agent of "+host+" has a libvirtd", func() error {
		names := strings.Fields(c.virsh(host, "list", "--all", "--name"))
		for _, name := range names {
			info, err := c.Guest(host, name)
			if err != nil {
				return err
			}
			if info == nil || info.State == "unreachable" {
				return fmt.Errorf("%s is %v", name, info)
			}
		}
		return nil
	})
}
