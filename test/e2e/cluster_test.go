package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/guest/flat"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/testenv"
	"github.com/lmctl/lmctl/migrate"
	"github.com/lmctl/lmctl/test/labtest"
)

// cluster is a lab for one test.
type cluster struct{ *labtest.Cluster }

func (c *cluster) in(t *testing.T) *cluster { return &cluster{c.Showing(t)} }

// newCluster makes a lab of two hosts whose agents stop at failpoints.
func newCluster(t *testing.T, tune ...func(*lab.Options)) *cluster {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedTracker(t, dirtymap.Probe)
	o := lab.Options{Dir: filepath.Join(t.TempDir(), "lab"), Hosts: 2, Binary: binary, MemoryLimit: 2 << 30}
	for _, f := range tune {
		f(&o)
	}
	return &cluster{labtest.Up(t, o).Showing(t)}
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
	c.T.Helper()
	testenv.NeedKVM(c.T)
	image, err := config.Image()
	if err != nil {
		c.T.Fatal(err)
	}
	disk := filepath.Join(c.Lab.Storage(), name+"-"+host+".img")
	if err := os.WriteFile(disk, image, 0o600); err != nil {
		c.T.Fatal(err)
	}
	yaml := fmt.Sprintf("name: %q\nmemory: %d\naccelerator: kvm\ndisks:\n- path: %s\n  bus: ide\nnics:\n- bridge: br0\n  addresses: [10.77.0.200]\n%s",
		name, config.Memory, disk, extra)
	ctx, cancel := context.WithTimeout(c.T.Context(), labtest.Patience)
	defer cancel()
	guests := c.Clients[host].Guests
	g, err := guests.Define(ctx, &lmctlv1.DefineRequest{Definition: []byte(yaml)})
	if err != nil {
		c.T.Fatal(err)
	}
	if _, err := guests.Start(ctx, &lmctlv1.GuestRequest{Name: name}); err != nil {
		c.T.Fatal(err)
	}
	f := &flatGuest{c: c, name: name, config: config, uuid: g.Uuid, taps: 1 + strings.Count(extra, "- bridge:")}
	c.Eventually("the flat guest boots", func() error {
		s, err := f.state(host)
		if err != nil {
			return err
		}
		return s.Err()
	})
	return f
}

func (f *flatGuest) memory(host string) string {
	return filepath.Join(f.c.Lab.MemoryDir(host), f.uuid+".ram")
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
	f.c.T.Helper()
	before, err := f.state(host)
	if err != nil {
		f.c.T.Fatalf("guest on %s: %v", host, err)
	}
	f.c.Eventually("the guest goes on on "+host, func() error {
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

// destroy ends a guest wherever it is, and forgets it.
func (c *cluster) destroy(g *flatGuest) {
	ctx, cancel := context.WithTimeout(context.Background(), labtest.Patience)
	defer cancel()
	for _, h := range c.Lab.Hosts() {
		info, err := c.Guest(h, g.name)
		if err != nil {
			c.T.Error(err)
		}
		if info == nil {
			continue
		}
		guests := c.Clients[h].Guests
		if info.State != "stopped" {
			if _, err := guests.Destroy(ctx, &lmctlv1.GuestRequest{Name: g.name}); err != nil {
				c.T.Error(err)
			}
		}
		if _, err := guests.Undefine(ctx, &lmctlv1.GuestRequest{Name: g.name}); err != nil {
			c.T.Error(err)
		}
	}
}

// ballast is what fills a host's memory.
const ballast = "ballast"

// fill takes all that is left of a host's file system for guest memory.
func (c *cluster) fill(host string) {
	c.T.Helper()
	f, err := os.Create(filepath.Join(c.Lab.MemoryDir(host), ballast))
	if err != nil {
		c.T.Fatal(err)
	}
	defer f.Close()
	for size := int64(0); ; { // others may take some of it at the same time
		var fs unix.Statfs_t
		if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
			c.T.Fatal(err)
		}
		free := int64(fs.Bavail) * fs.Bsize
		if free == 0 {
			return
		}
		switch err := unix.Fallocate(int(f.Fd()), 0, size, free); {
		case err == nil:
			size += free
		case !errors.Is(err, unix.ENOSPC):
			c.T.Fatal(err)
		}
	}
}

// empty undoes fill.
func (c *cluster) empty(host string) {
	c.T.Helper()
	if err := os.Remove(filepath.Join(c.Lab.MemoryDir(host), ballast)); err != nil {
		c.T.Fatal(err)
	}
}

// start starts a migration and returns its id.
func (c *cluster) start(guest, from, to string, options *lmctlv1.MigrationOptions) string {
	c.T.Helper()
	id, err := c.Begin(guest, from, to, options)
	if err != nil {
		c.T.Fatal(err)
	}
	return id
}

// wait waits for a migration's end and returns its report.
func (c *cluster) wait(host, id string) *migrate.Report {
	c.T.Helper()
	r, err := c.Wait(host, id)
	if err != nil {
		c.T.Fatal(err)
	}
	return r
}

// move migrates a guest, verifying, and fails the test unless it arrives.
func (c *cluster) move(guest, from, to string) *migrate.Report {
	c.T.Helper()
	r := c.wait(from, c.start(guest, from, to, &lmctlv1.MigrationOptions{Verify: true}))
	if r.Result != migrate.Completed {
		c.T.Fatalf("%s from %s to %s: %s: %s", guest, from, to, r.Result, r.Error)
	}
	if len(r.Passes) < 1 || len(r.Passes) > 8 || r.VerifiedPages*migrate.PageSize != r.RAMBytes {
		c.T.Errorf("%d passes, %d pages verified of %d bytes", len(r.Passes), r.VerifiedPages, r.RAMBytes)
	}
	return r
}

func other(host string) string {
	if host == "host1" {
		return "host2"
	}
	return "host1"
}
