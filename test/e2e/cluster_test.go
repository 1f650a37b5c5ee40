package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/guest/flat"
	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/testenv"
	"github.com/lmctl/lmctl/migrate"
)

// patience is how long a test waits for what must come. It is no measure of
// speed: machines that run tests are slow and shared.
const patience = 60 * time.Second

// cluster is a lab for one test.
type cluster struct {
	t          *testing.T
	lab        *lab.Lab
	failpoints string
	clients    map[string]*api.Client
}

// newCluster makes a lab of two hosts whose agents stop at failpoints and lose
// patience with each other quickly.
func newCluster(t *testing.T, tune ...func(*lab.Options)) *cluster {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedTracker(t, dirtymap.Probe)
	failpoints := t.TempDir()
	o := lab.Options{
		Dir: filepath.Join(t.TempDir(), "lab"), Hosts: 2, Binary: binary, MemoryLimit: 2 << 30,
		AgentEnv: []string{"LMCTL_FAILPOINTS=" + failpoints},
	}
	for _, f := range tune {
		f(&o)
	}
	l, err := lab.Up(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, lab: l, failpoints: failpoints, clients: make(map[string]*api.Client)}
	for _, host := range l.Hosts() {
		if c.clients[host], err = api.Dial(api.Target{Socket: l.AgentSocket(host)}); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(c.close)
	return c
}

func (c *cluster) close() {
	for _, client := range c.clients {
		if err := client.Close(); err != nil {
			c.t.Error(err)
		}
	}
	if c.t.Failed() {
		c.showLogs()
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := lab.Down(ctx, c.lab.Dir()); err != nil {
		c.t.Errorf("lab down: %v", err)
	}
}

// showLogs prints the ends of the agents' logs into that of a failed test.
func (c *cluster) showLogs() {
	for _, host := range c.lab.Hosts() {
		b, err := os.ReadFile(c.lab.AgentLog(host))
		if err != nil {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		c.t.Logf("agent of %s:\n%s", host, strings.Join(lines[max(0, len(lines)-60):], "\n"))
	}
}

// flatGuest is a guest under real KVM, and how to judge it.
type flatGuest struct {
	c      *cluster
	name   string
	config flat.Config
	uuid   string
	taps   int
}

// startFlat defines and starts a flat guest on a host and waits until it runs
// its loop. extra is added to its definition.
func (c *cluster) startFlat(name, host string, config flat.Config, extra string) *flatGuest {
	c.t.Helper()
	testenv.NeedKVM(c.t)
	image, err := config.Image()
	if err != nil {
		c.t.Fatal(err)
	}
	disk := filepath.Join(c.lab.Storage(), name+"-"+host+".img")
	if err := os.WriteFile(disk, image, 0o600); err != nil {
		c.t.Fatal(err)
	}
	yaml := fmt.Sprintf("name: %q\nmemory: %d\naccelerator: kvm\ndisks:\n- path: %s\n  bus: ide\nnics:\n- bridge: br0\n  addresses: [10.77.0.200]\n%s",
		name, config.Memory, disk, extra)
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	guests := c.clients[host].Guests
	g, err := guests.Define(ctx, &lmctlv1.DefineRequest{Definition: []byte(yaml)})
	if err != nil {
		c.t.Fatal(err)
	}
	if _, err := guests.Start(ctx, &lmctlv1.GuestRequest{Name: name}); err != nil {
		c.t.Fatal(err)
	}
	f := &flatGuest{c: c, name: name, config: config, uuid: g.Uuid, taps: 1 + strings.Count(extra, "- bridge:")}
	c.eventually("the flat guest boots", func() error {
		s, err := f.state(host)
		if err != nil {
			return err
		}
		return s.Err()
	})
	return f
}

func (f *flatGuest) memory(host string) string {
	return filepath.Join(f.c.lab.MemoryDir(host), f.uuid+".ram")
}

func (f *flatGuest) state(host string) (flat.State, error) {
	m, err := os.Open(f.memory(host))
	if err != nil {
		return flat.State{}, err
	}
	defer m.Close()
	return flat.ReadState(m)
}

// goesOn checks that the guest on a host is healthy and goes on.
func (f *flatGuest) goesOn(host string) {
	f.c.t.Helper()
	before, err := f.state(host)
	if err != nil {
		f.c.t.Fatalf("guest on %s: %v", host, err)
	}
	f.c.eventually("the guest goes on on "+host, func() error {
		s, err := f.state(host)
		switch {
		case err != nil:
			return err
		case s.Err() != nil:
			return s.Err()
		case s.Counter < before.Counter+100 || s.Pass < before.Pass+2 && f.config.Rate != 0:
			return fmt.Errorf("counter %d, pass %d after counter %d, pass %d", s.Counter, s.Pass, before.Counter, before.Pass)
		}
		return nil
	})
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
		time.Sleep(2 * time.Millisecond)
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

// destroy ends a guest wherever it is, and forgets it.
func (c *cluster) destroy(g *flatGuest) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, h := range c.lab.Hosts() {
		info, err := c.guest(h, g.name)
		if err != nil {
			c.t.Error(err)
		}
		if info == nil {
			continue
		}
		guests := c.clients[h].Guests
		if info.State != "stopped" {
			if _, err := guests.Destroy(ctx, &lmctlv1.GuestRequest{Name: g.name}); err != nil {
				c.t.Error(err)
			}
		}
		if _, err := guests.Undefine(ctx, &lmctlv1.GuestRequest{Name: g.name}); err != nil {
			c.t.Error(err)
		}
	}
}

// ballast is what fills a host's memory.
const ballast = "ballast"

// fill takes all that is left of a host's file system for guest memory.
func (c *cluster) fill(host string) {
	c.t.Helper()
	f, err := os.Create(filepath.Join(c.lab.MemoryDir(host), ballast))
	if err != nil {
		c.t.Fatal(err)
	}
	defer f.Close()
	for size := int64(0); ; { // others may take some of it at the same time
		var fs unix.Statfs_t
		if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
			c.t.Fatal(err)
		}
		free := int64(fs.Bavail) * fs.Bsize
		if free == 0 {
			return
		}
		switch err := unix.Fallocate(int(f.Fd()), 0, size, free); {
		case err == nil:
			size += free
		case !errors.Is(err, unix.ENOSPC):
			c.t.Fatal(err)
		}
	}
}

// empty undoes fill.
func (c *cluster) empty(host string) {
	c.t.Helper()
	if err := os.Remove(filepath.Join(c.lab.MemoryDir(host), ballast)); err != nil {
		c.t.Fatal(err)
	}
}

// start starts a migration and returns its id.
func (c *cluster) start(guest, from, to string, options *lmctlv1.MigrationOptions) string {
	c.t.Helper()
	m, err := c.clients[from].Migrations.Start(c.t.Context(), &lmctlv1.StartMigrationRequest{Guest: guest, Destination: to, Options: options})
	if err != nil {
		c.t.Fatal(err)
	}
	return m.Id
}

// wait waits for a migration's end and returns its report.
func (c *cluster) wait(host, id string) *migrate.Report {
	c.t.Helper()
	stream, err := c.clients[host].Migrations.Watch(c.t.Context(), &lmctlv1.MigrationRequest{Id: id})
	if err != nil {
		c.t.Fatal(err)
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			c.t.Fatalf("watch migration %s: %v", id, err)
		}
		if m.Finished {
			var r migrate.Report
			if err := json.Unmarshal(m.Report, &r); err != nil {
				c.t.Fatal(err)
			}
			return &r
		}
	}
}

// move migrates a guest, verifying, and fails the test unless it arrives.
func (c *cluster) move(guest, from, to string) *migrate.Report {
	c.t.Helper()
	r := c.wait(from, c.start(guest, from, to, &lmctlv1.MigrationOptions{Verify: true}))
	if r.Result != migrate.Completed {
		c.t.Fatalf("%s from %s to %s: %s: %s", guest, from, to, r.Result, r.Error)
	}
	if len(r.Passes) < 1 || len(r.Passes) > 8 || r.VerifiedPages*migrate.PageSize != r.RAMBytes {
		c.t.Errorf("%d passes, %d pages verified of %d bytes", len(r.Passes), r.VerifiedPages, r.RAMBytes)
	}
	return r
}

func other(host string) string {
	if host == "host1" {
		return "host2"
	}
	return "host1"
}
