package libvirt

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/lab/domain"
	"github.com/lmctl/lmctl/internal/testenv"
	"github.com/lmctl/lmctl/migrate"
)

// patience is how long a test waits for what must come. It is no measure of
// speed: machines that run tests are slow and shared.
const patience = 60 * time.Second

// memoryLimit is what each host has for guest memory, in bytes.
const memoryLimit = 10 << 30

// qemuUser is whom QEMU runs as, as Debian has it.
const qemuUser = "libvirt-qemu"

// cluster is the lab as one test uses it.
type cluster struct {
	t       *testing.T
	lab     *lab.Lab
	clients map[string]*api.Client
}

// newCluster gives a test the common lab: two hosts whose agents stop at
// failpoints, and whose libvirtd's run QEMU as distributions do. Tests that
// disturb others do not run in parallel.
func newCluster(t *testing.T) *cluster {
	t.Helper()
	needs(t)
	if common == nil {
		common = up(context.Background(), t, "lab", lab.Options{Hosts: 2, MemoryLimit: memoryLimit})
	}
	return clusterOf(t, common)
}

// ownCluster is newCluster with a lab that is the test's alone, in a folder of
// this name.
func ownCluster(t *testing.T, folder string, o lab.Options) *cluster {
	t.Helper()
	needs(t)
	l := up(t.Context(), t, folder, o)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := lab.Down(ctx, l.Dir()); err != nil {
			t.Error(err)
		}
	})
	return clusterOf(t, l)
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

// up makes a lab, whose options it completes with what all have here.
func up(ctx context.Context, t *testing.T, folder string, o lab.Options) *lab.Lab {
	t.Helper()
	o.Dir, o.Binary = filepath.Join(work.dir, folder), work.binary
	if err := os.Mkdir(failpoints(o.Dir), 0o700); err != nil {
		t.Fatal(err)
	}
	o.AgentEnv = append(o.AgentEnv, "LMCTL_FAILPOINTS="+failpoints(o.Dir))
	// No dynamic ownership: libvirt does not take the machine's own file system
	// for one that hosts share, and the host that a guest left, or did not come
	// to, would take the disk from the QEMU that has it.
	o.Hypervisor, o.Libvirt.User, o.Libvirt.Virtlogd = lab.Libvirt, qemuUser, true
	l, err := lab.Up(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// failpoints is where the agents of a lab look for the states that they are to
// stop at.
func failpoints(lab string) string { return lab + ".failpoints" }

// clusterOf gives a test a lab.
func clusterOf(t *testing.T, l *lab.Lab) *cluster {
	t.Helper()
	c := &cluster{t: t, lab: l, clients: make(map[string]*api.Client)}
	for _, host := range l.Hosts() {
		client, err := api.Dial(api.Target{Socket: l.AgentSocket(host)})
		if err != nil {
			t.Fatal(err)
		}
		c.clients[host] = client
		t.Cleanup(func() {
			if err := client.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	return c
}

// in is the cluster for a subtest.
func (c *cluster) in(t *testing.T) *cluster {
	sub := *c
	sub.t = t
	return &sub
}

// showing is in for a subtest that shows the daemons' logs when it fails.
func (c *cluster) showing(t *testing.T) *cluster {
	sub := c.in(t)
	t.Cleanup(func() {
		if t.Failed() {
			sub.showLogs()
		}
	})
	return sub
}

// showLogs prints the ends of the daemons' logs into that of a failed test.
func (c *cluster) showLogs() {
	for _, host := range c.lab.Hosts() {
		for _, d := range c.lab.Daemons() {
			b, err := os.ReadFile(c.lab.DaemonLog(host, d))
			if err != nil || len(b) == 0 {
				continue
			}
			lines := strings.Split(strings.TrimSpace(string(b)), "\n")
			c.t.Logf("%s of %s:\n%s", d, host, strings.Join(lines[max(0, len(lines)-40):], "\n"))
		}
	}
}

// context ends when a test has waited long enough, even for its cleaning up.
func (c *cluster) context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	c.t.Cleanup(cancel)
	return ctx
}

// start makes a guest, runs it on its host and sees to its end.
func (c *cluster) start(spec lab.GuestSpec) lab.Guest {
	c.t.Helper()
	g, err := c.lab.StartGuest(c.t.Context(), spec, func(what string) { c.t.Log(what) })
	if err != nil {
		c.t.Fatal(err)
	}
	return g
}

// remove ends a guest and checks that both hosts are as before it.
func (c *cluster) remove(g lab.Guest) {
	c.t.Helper()
	if err := c.lab.RemoveGuest(c.context(), g.Name); err != nil {
		c.t.Error(err)
		return
	}
	c.nothingLeft(g, "")
}

// virsh runs a command of virsh on a host.
func (c *cluster) virsh(host string, args ...string) string {
	c.t.Helper()
	out, err := c.lab.Output(c.context(), host, append([]string{"virsh"}, args...)...)
	if err != nil {
		c.t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// healthy has a guest check all of its memory and sees that it goes on, on this
// host.
func (c *cluster) healthy(g lab.Guest, host string) {
	c.t.Helper()
	v, err := c.lab.CheckGuest(c.context(), g.Name)
	if err != nil {
		c.t.Fatal(err)
	}
	if !v.OK || v.Host != host {
		c.t.Fatalf("guest %s on %s, wanted on %s: %q", g.Name, v.Host, host, v.Problems)
	}
}

// eventually waits for a condition that no event announces to a test.
func (c *cluster) eventually(what string, ok func() error) {
	c.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("%s: not within %v: %v", what, patience, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// guest asks a host's agent for a guest, nil if it has none of that name.
func (c *cluster) guest(host, name string) (*lmctlv1.Guest, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	list, err := c.clients[host].Guests.List(ctx, &lmctlv1.ListGuestsRequest{})
	if err != nil {
		return nil, err
	}
	for _, g := range list.Guests {
		if g.Name == name {
			return g, nil
		}
	}
	return nil, nil
}

// begin starts a migration and returns its id.
func (c *cluster) begin(guest, from, to string, options *lmctlv1.MigrationOptions) (string, error) {
	m, err := c.clients[from].Migrations.Start(c.t.Context(), &lmctlv1.StartMigrationRequest{Guest: guest, Destination: to, Options: options})
	if err != nil {
		return "", err
	}
	return m.Id, nil
}

// inState is an error unless a migration is in a state.
func (c *cluster) inState(host, id string, want migrate.State) error {
	m, err := c.clients[host].Migrations.Show(c.t.Context(), &lmctlv1.MigrationRequest{Id: id})
	if err == nil && m.State != string(want) {
		err = fmt.Errorf("it is %s: %s", m.State, m.Error)
	}
	return err
}

// wait waits for a migration's end and returns its report.
func (c *cluster) wait(host, id string) (*migrate.Report, error) {
	stream, err := c.clients[host].Migrations.Watch(c.context(), &lmctlv1.MigrationRequest{Id: id})
	if err != nil {
		return nil, err
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			return nil, fmt.Errorf("watch migration %s: %w", id, err)
		}
		if m.Finished {
			var r migrate.Report
			return &r, json.Unmarshal(m.Report, &r)
		}
	}
}

// try migrates a guest, verifying, to its end.
func (c *cluster) try(guest, from, to string) (*migrate.Report, error) {
	return c.tryWith(guest, from, to, &lmctlv1.MigrationOptions{Verify: true})
}

func (c *cluster) tryWith(guest, from, to string, options *lmctlv1.MigrationOptions) (*migrate.Report, error) {
	id, err := c.begin(guest, from, to, options)
	if err != nil {
		return nil, err
	}
	return c.wait(from, id)
}

// relay moves a guest, which must arrive whole, by QEMU's own passes.
func (c *cluster) relay(g lab.Guest, from, to string, options *lmctlv1.MigrationOptions) *migrate.Report {
	c.t.Helper()
	r, err := c.tryWith(g.Name, from, to, options)
	if err != nil {
		c.t.Fatal(err)
	}
	if r.Result != migrate.Completed || r.Mode != migrate.Relay {
		c.t.Fatalf("%s from %s to %s: %s in %s mode: %s", g.Name, from, to, r.Result, r.Mode, r.Error)
	}
	most := 8
	if options.MaxPasses != nil {
		most = int(*options.MaxPasses)
	}
	if len(r.Passes) < 1 || len(r.Passes) > most || r.Passes[0].Pages == 0 || r.RAMBytes != g.Memory || r.Downtime <= 0 {
		c.t.Errorf("%d passes at most, memory of %d bytes: %+v", most, g.Memory, r)
	}
	return r
}

// move is try for a guest that must arrive, whole.
func (c *cluster) move(g lab.Guest, from, to string) *migrate.Report {
	c.t.Helper()
	r, err := c.try(g.Name, from, to)
	if err != nil {
		c.t.Fatal(err)
	}
	if r.Result != migrate.Completed {
		c.t.Fatalf("%s from %s to %s: %s: %s", g.Name, from, to, r.Result, r.Error)
	}
	if r.Mode != migrate.Direct || len(r.Passes) < 1 || len(r.Passes) > 8 || r.VerifiedPages*migrate.PageSize != r.RAMBytes || r.RAMBytes != g.Memory {
		c.t.Errorf("%s mode, %d passes, %d pages verified of %d bytes; the guest has %d", r.Mode, len(r.Passes), r.VerifiedPages, r.RAMBytes, g.Memory)
	}
	return r
}
