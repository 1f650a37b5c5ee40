package libvirt

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/lab/domain"
	"github.com/lmctl/lmctl/internal/testenv"
	"github.com/lmctl/lmctl/migrate"
	"github.com/lmctl/lmctl/test/labtest"
)

// memoryLimit is what each host has for guest memory, in bytes.
const memoryLimit = 10 << 30

// diskLimit is what each host has for what is its own on disk, in bytes.
const diskLimit = 64 << 20

// qemuUser is whom QEMU runs as, as Debian has it.
const qemuUser = "libvirt-qemu"

// cluster is the lab as one test uses it.
type cluster struct{ *labtest.Cluster }

func (c *cluster) in(t *testing.T) *cluster      { return &cluster{c.In(t)} }
func (c *cluster) showing(t *testing.T) *cluster { return &cluster{c.Showing(t)} }

// newCluster gives a test the common lab: two hosts whose agents stop at
// failpoints, and whose libvirtd's run QEMU as distributions do. Tests that
// disturb others do not run in parallel.
func newCluster(t *testing.T) *cluster {
	t.Helper()
	needs(t)
	if common == nil {
		l, err := labtest.Start(context.Background(), options("lab", lab.Options{Hosts: 2, MemoryLimit: memoryLimit}))
		if err != nil {
			t.Fatal(err)
		}
		common = l
	}
	return &cluster{labtest.Of(t, common)}
}

// ownCluster is newCluster with a lab that is the test's alone, in a folder of
// this name.
func ownCluster(t *testing.T, folder string, o lab.Options) *cluster {
	t.Helper()
	needs(t)
	return &cluster{labtest.Up(t, options(folder, o))}
}

// needs is what all labs of these tests need.
func needs(t *testing.T) {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedKVM(t)
	testenv.NeedTracker(t, dirtymap.Probe)
	testenv.NeedTool(t, "virsh")
	if _, err := user.Lookup(qemuUser); err != nil {
		testenv.Missing(t, "the user "+qemuUser, err)
	}
	for _, path := range []string{domain.FirmwareCode, domain.FirmwareVars} {
		if _, err := os.Stat(path); err != nil {
			testenv.Missing(t, "UEFI firmware", err)
		}
	}
}

// options completes those of a lab with what all have here.
func options(folder string, o lab.Options) lab.Options {
	o.Dir, o.Binary = filepath.Join(work.dir, folder), work.binary
	o.DiskLimit = diskLimit
	// No dynamic ownership: libvirt does not take the machine's own file system
	// for one that hosts share, and the host that a guest left, or did not come
	// to, would take the disk from the QEMU that has it.
	o.Hypervisor, o.Libvirt.User, o.Libvirt.Virtlogd = lab.Libvirt, qemuUser, true
	return o
}

// start makes a guest, runs it on its host and sees to its end.
func (c *cluster) start(spec lab.GuestSpec) lab.Guest {
	c.T.Helper()
	g, err := c.Lab.StartGuest(c.T.Context(), spec, func(what string) { c.T.Log(what) })
	if err != nil {
		c.T.Fatal(err)
	}
	return g
}

// remove ends a guest and checks that both hosts are as before it.
func (c *cluster) remove(g lab.Guest) {
	c.T.Helper()
	if err := c.Lab.RemoveGuest(c.Context(), g.Name); err != nil {
		c.T.Error(err)
		return
	}
	c.nothingLeft(g, "")
}

// virsh runs a command of virsh on a host.
func (c *cluster) virsh(host string, args ...string) string {
	c.T.Helper()
	out, err := c.Lab.Output(c.Context(), host, append([]string{"virsh"}, args...)...)
	if err != nil {
		c.T.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// healthy has a guest check all of its memory and sees that it goes on, on this
// host.
func (c *cluster) healthy(g lab.Guest, host string) {
	c.T.Helper()
	v, err := c.Lab.CheckGuest(c.Context(), g.Name)
	if err != nil {
		c.T.Fatal(err)
	}
	if !v.OK || v.Host != host {
		c.T.Fatalf("guest %s on %s, wanted on %s: %q", g.Name, v.Host, host, v.Problems)
	}
}

// inState is an error unless a migration is in a state.
func (c *cluster) inState(host, id string, want migrate.State) error {
	m, err := c.Clients[host].Migrations.Show(c.T.Context(), &lmctlv1.MigrationRequest{Id: id})
	if err == nil && m.State != string(want) {
		err = fmt.Errorf("it is %s: %s", m.State, m.Error)
	}
	return err
}

// try migrates a guest, verifying, to its end.
func (c *cluster) try(guest, from, to string) (*migrate.Report, error) {
	return c.tryWith(guest, from, to, &lmctlv1.MigrationOptions{Verify: true})
}

func (c *cluster) tryWith(guest, from, to string, options *lmctlv1.MigrationOptions) (*migrate.Report, error) {
	id, err := c.Begin(guest, from, to, options)
	if err != nil {
		return nil, err
	}
	return c.Wait(from, id)
}

// relay moves a guest, which must arrive whole, by QEMU's own passes.
func (c *cluster) relay(g lab.Guest, from, to string, options *lmctlv1.MigrationOptions) *migrate.Report {
	c.T.Helper()
	r, err := c.tryWith(g.Name, from, to, options)
	if err != nil {
		c.T.Fatal(err)
	}
	if r.Result != migrate.Completed || r.Mode != migrate.Relay {
		c.T.Fatalf("%s from %s to %s: %s in %s mode: %s", g.Name, from, to, r.Result, r.Mode, r.Error)
	}
	most := 8
	if options.MaxPasses != nil {
		most = int(*options.MaxPasses)
	}
	if len(r.Passes) < 1 || len(r.Passes) > most || r.Passes[0].Pages == 0 || r.RAMBytes != g.Memory || r.Downtime <= 0 {
		c.T.Errorf("%d passes at most, memory of %d bytes: %+v", most, g.Memory, r)
	}
	return r
}

// move is try for a guest that must arrive, whole.
func (c *cluster) move(g lab.Guest, from, to string) *migrate.Report {
	c.T.Helper()
	r, err := c.try(g.Name, from, to)
	if err != nil {
		c.T.Fatal(err)
	}
	if r.Result != migrate.Completed {
		c.T.Fatalf("%s from %s to %s: %s: %s", g.Name, from, to, r.Result, r.Error)
	}
	if r.Mode != migrate.Direct || len(r.Passes) < 1 || len(r.Passes) > 8 || r.VerifiedPages*migrate.PageSize != r.RAMBytes || r.RAMBytes != g.Memory {
		c.T.Errorf("%s mode, %d passes, %d pages verified of %d bytes; the guest has %d", r.Mode, len(r.Passes), r.VerifiedPages, r.RAMBytes, g.Memory)
	}
	return r
}
