package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/lmctl/lmctl/guest/control"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/testenv"
	"github.com/lmctl/lmctl/migrate"
)

// show asks a host's agent for a guest that it must have.
func (c *cluster) show(host, name string) *lmctlv1.Guest {
	c.T.Helper()
	g, err := c.Clients[host].Guests.Show(c.T.Context(), &lmctlv1.GuestRequest{Name: name})
	if err != nil {
		c.T.Fatal(err)
	}
	return g
}

// TestNewQEMU moves guests between hosts with QEMU 10.
func TestNewQEMU(t *testing.T) {
	qemu10, _ := testenv.NeedQEMU10(t)
	c := newCluster(t)
	t.Run("flat", func(t *testing.T) {
		c := c.in(t)
		g := c.startFlat("flat", "host1", quiet, "qemu: "+qemu10+"\n")
		defer c.destroy(g)
		for _, host := range []string{"host1", "host2"} {
			c.move(g.name, host, other(host))
			g.goesOn(other(host))
			if v := c.show(other(host), g.name).HypervisorVersion; !newest(v) {
				t.Errorf("it runs in QEMU %s", v)
			}
			c.nothingLeft(g, other(host))
		}
	})
	t.Run("linux", func(t *testing.T) {
		c := c.in(t)
		g := c.startLinux(lab.GuestSpec{
			Name: "linux", Memory: 160 << 20, DirtyRate: 4 << 20, WorkingSet: 8 << 20, QEMU: qemu10,
			DiskSetting: control.DiskSetting{Rate: 10, Readers: 2},
		})
		clients := g.underTraffic()
		if r := c.move(g.Name, "host1", "host2"); r.Announced < 1 {
			t.Error("no address was announced")
		}
		last := g.healthy("host2")
		clients.whole()
		g.records(last.Disk.Last)
		if v := c.show("host2", g.Name).HypervisorVersion; !newest(v) {
			t.Errorf("it runs in QEMU %s", v)
		}
		c.nothingLeft(g.asFlat(), "host2")
	})
}

// newest says whether a QEMU is 10 or later.
func newest(version string) bool {
	major, _, _ := strings.Cut(version, ".")
	n, err := strconv.Atoi(major)
	return err == nil && n >= 10
}

// olderAndNewer makes a host1 with the machine's own QEMU and a host2 with QEMU
// 10, each found in its host's PATH.
func olderAndNewer(t *testing.T) *cluster {
	t.Helper()
	testenv.NeedQEMU(t)
	qemu10, _ := testenv.NeedQEMU10(t)
	paths := t.TempDir()
	for _, host := range []string{"host1", "host2"} {
		if err := os.Mkdir(filepath.Join(paths, host), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(qemu10, filepath.Join(paths, "host2", "qemu-system-x86_64")); err != nil {
		t.Fatal(err)
	}
	return newCluster(t, func(o *lab.Options) {
		o.AgentEnv = append(o.AgentEnv, "PATH="+filepath.Join(paths, "{host}")+":"+os.Getenv("PATH"))
	})
}

// TestUpgrade moves a guest from a host with an older QEMU to one with a newer,
// and back: it keeps the machine that it was started as.
func TestUpgrade(t *testing.T) {
	c := olderAndNewer(t)
	g := c.startFlat("upgraded", "host1", quiet, "")
	started := c.show("host1", g.name)
	if newest(started.HypervisorVersion) {
		testenv.Lacks(t, "a QEMU older than 10", os.ErrNotExist)
	}
	if !strings.HasPrefix(started.Machine, "pc-i440fx-") {
		t.Errorf("it was started as a %q", started.Machine)
	}
	c.move(g.name, "host1", "host2")
	g.goesOn("host2")
	if there := c.show("host2", g.name); !newest(there.HypervisorVersion) || there.Machine != started.Machine {
		t.Errorf("from QEMU %s, %s, to QEMU %s, %s", started.HypervisorVersion, started.Machine, there.HypervisorVersion, there.Machine)
	}
	c.nothingLeft(g, "host2")
	c.move(g.name, "host2", "host1")
	g.goesOn("host1")
	if back := c.show("host1", g.name); back.HypervisorVersion != started.HypervisorVersion || back.Machine != started.Machine {
		t.Errorf("back to QEMU %s, %s", back.HypervisorVersion, back.Machine)
	}
	c.nothingLeft(g, "host1")
}

// TestDowngradeRefused moves a guest that was started as a machine of the newer
// QEMU to a host that has none.
func TestDowngradeRefused(t *testing.T) {
	c := olderAndNewer(t)
	g := c.startFlat("modern", "host2", quiet, "")
	started := c.show("host2", g.name)
	own, err := c.Clients["host1"].Hosts.Show(t.Context(), &lmctlv1.HostRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if newest(own.HypervisorVersion) {
		testenv.Lacks(t, "a QEMU older than 10", os.ErrNotExist)
	}
	r := c.wait("host2", c.start(g.name, "host2", "host1", nil))
	if r.Result != migrate.Refused || !strings.Contains(r.Error, "no machine type "+started.Machine) || !strings.Contains(r.Error, own.HypervisorVersion) {
		t.Errorf("%s: %s; want a refusal that names %s and QEMU %s", r.Result, r.Error, started.Machine, own.HypervisorVersion)
	}
	g.goesOn("host2")
	c.nothingLeft(g, "host2")
	if info, err := c.Guest("host1", g.name); err != nil || info != nil {
		t.Errorf("host1 has %v, %v", info, err)
	}
}
