package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/lmctl/lmctl/guest/client"
	"github.com/lmctl/lmctl/guest/control"
	"github.com/lmctl/lmctl/guest/linux"
	"github.com/lmctl/lmctl/guest/workload"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/testenv"
	"github.com/lmctl/lmctl/migrate"
	"github.com/lmctl/lmctl/test/labtest"
)

// linuxGuest is a Linux guest under TCG, with network and disk.
type linuxGuest struct {
	lab.Guest
	c *cluster
}

// startLinux boots a Linux guest on host1.
func (c *cluster) startLinux(spec lab.GuestSpec) *linuxGuest {
	c.T.Helper()
	testenv.NeedQEMU(c.T)
	cache, err := linux.CacheDir()
	if err != nil {
		c.T.Fatal(err)
	}
	say := func(what string) { c.T.Log(what) }
	if _, err := linux.FetchKernel(c.T.Context(), cache, say); err != nil {
		testenv.Missing(c.T, "Debian's cloud kernel", err)
	}
	testenv.TCG(c.T)
	// Not the one that this test may have been built with: that may be old.
	init, err := linux.BuildInit(c.T.Context())
	if err != nil {
		c.T.Fatal(err)
	}
	path := filepath.Join(c.T.TempDir(), "init")
	if err := os.WriteFile(path, init, 0o600); err != nil {
		c.T.Fatal(err)
	}
	c.T.Setenv("LMCTL_GUEST_INIT", path)
	spec.Kind, spec.Host, spec.Accelerator = lab.Linux, "host1", "tcg"
	g, err := c.Lab.StartGuest(c.T.Context(), spec, say)
	if err != nil {
		c.T.Fatal(err)
	}
	return &linuxGuest{Guest: g, c: c}
}

// asFlat is the guest for what is the same with guests of any kind.
func (g *linuxGuest) asFlat() *flatGuest {
	return &flatGuest{c: g.c, name: g.Name, uuid: g.UUID, taps: 1}
}

// healthy has the guest check all that it has on a host.
func (g *linuxGuest) healthy(host string) *control.Status {
	g.c.T.Helper()
	v, err := g.c.Lab.CheckGuest(g.c.T.Context(), g.Name)
	if err != nil || !v.OK || v.Host != host {
		g.c.T.Fatalf("verdict %+v, %v; want a healthy guest on %s", v, err, host)
	}
	return v.Linux
}

// records checks from outside that each record that the guest wrote is in its
// place on the disk, none left out.
func (g *linuxGuest) records(last uint64) {
	g.c.T.Helper()
	f, err := os.Open(filepath.Join(g.c.Lab.Storage(), g.Name+".raw"))
	if err != nil {
		g.c.T.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		g.c.T.Fatal(err)
	}
	slots := uint64(info.Size() / workload.RecordSize)
	if last == 0 || last >= slots {
		g.c.T.Fatalf("%d records on a disk of %d", last, slots)
	}
	record := make([]byte, workload.RecordSize)
	for n := uint64(1); n <= last; n++ {
		// A disk of one record only, with room for any.
		place := io.NewSectionReader(f, int64(n*workload.RecordSize), workload.RecordSize)
		if have, err := workload.LastRecord(place, record, 1, uint64(g.Number)); err != nil || have != n {
			g.c.T.Fatalf("record %d of %d is missing: its place has %d, %v", n, last, have, err)
		}
	}
}

// traffic is what clients of a guest do, all the time.
type traffic struct {
	t     *testing.T
	stop  context.CancelFunc
	group errgroup.Group
	tcp   client.Numbered
	udp   client.Pinged
}

func (g *linuxGuest) underTraffic() *traffic {
	t := g.c.T
	t.Helper()
	tcp, err := g.c.Lab.DialGuest(t.Context(), g.Guest, "tcp", control.NumberedPort)
	if err != nil {
		t.Fatal(err)
	}
	udp, err := g.c.Lab.DialGuest(t.Context(), g.Guest, "udp", control.EchoPort)
	if err != nil {
		t.Fatal(errors.Join(err, tcp.Close()))
	}
	ctx, stop := context.WithCancel(t.Context())
	l := &traffic{t: t, stop: stop}
	l.group.Go(func() (err error) {
		l.tcp, err = client.Number(ctx, tcp, 20*time.Millisecond)
		return err
	})
	l.group.Go(func() (err error) {
		l.udp, err = client.Ping(ctx, udp, 20*time.Millisecond)
		return err
	})
	t.Cleanup(func() { stop(); _ = l.group.Wait() }) // whole looks at the error
	return l
}

// whole ends the traffic and checks that nothing of it was lost: one
// connection, each request answered once, no datagram answered twice.
func (l *traffic) whole() {
	l.t.Helper()
	l.stop()
	if err := l.group.Wait(); err != nil {
		l.t.Errorf("traffic: %v", err)
	}
	if !l.tcp.Whole() {
		l.t.Errorf("TCP: %+v", l.tcp)
	}
	if l.udp.Sent == 0 || l.udp.Lost >= l.udp.Sent || l.udp.Doubled != 0 {
		l.t.Errorf("UDP: %+v", l.udp)
	}
}

// TestLinuxGuest moves a Linux guest to and fro with clients that talk to it. In
// between, migrations of it are cancelled and cut off.
func TestLinuxGuest(t *testing.T) {
	c := newCluster(t)
	g := c.startLinux(lab.GuestSpec{
		Name: "linux", Memory: 192 << 20, DirtyRate: 20 << 20, WorkingSet: 16 << 20,
		DiskSetting: control.DiskSetting{Rate: 10, Readers: 2},
	})
	w := c.watchRunning(g.asFlat())
	clients := g.underTraffic()
	before := g.healthy("host1")
	host := "host1"
	for i := range 6 {
		if r := c.move(g.Name, host, other(host)); r.Announced < 1 {
			t.Errorf("move %d: no address was announced", i+1)
		}
		host = other(host)
		after := g.healthy(host)
		if after.BootID != before.BootID || after.Disk.Last <= before.Disk.Last || after.Memory.Written <= before.Memory.Written {
			t.Fatalf("move %d: the guest was %+v and is %+v", i+1, before, after)
		}
		before = after
		c.nothingLeft(g.asFlat(), host)
	}
	g.cancelled()
	g.cutOff()
	clients.whole()
	last := g.healthy("host1")
	if last.BootID != before.BootID || last.Net.Accepted != 1 || last.Net.OutOfOrder != 0 || last.Net.Replies != clients.tcp.Replied {
		t.Errorf("the guest's own account of the connection: %+v", last.Net)
	}
	g.records(last.Disk.Last)
	w.never2()
}

// cancelled cancels a migration that copies.
func (g *linuxGuest) cancelled() {
	c := g.c
	c.T.Helper()
	id, goOn := g.copying()
	if _, err := c.Clients["host1"].Migrations.Cancel(c.T.Context(), &lmctlv1.MigrationRequest{Id: id}); err != nil {
		c.T.Fatal(err)
	}
	goOn()
	if r := c.wait("host1", id); r.Result != migrate.Cancelled {
		c.T.Fatalf("cancelled: %s: %s", r.Result, r.Error)
	}
	g.healthy("host1")
	c.nothingLeft(g.asFlat(), "host1")
}

// cutOff pulls the destination's cable while it is copied to.
func (g *linuxGuest) cutOff() {
	c := g.c
	c.T.Helper()
	id, goOn := g.copying()
	if err := c.Lab.Cut("host2"); err != nil {
		c.T.Fatal(err)
	}
	goOn()
	if r := c.wait("host1", id); r.Result != migrate.Failed {
		c.T.Fatalf("cut off: %s: %s", r.Result, r.Error)
	}
	g.healthy("host1")
	if err := c.Lab.Heal("host2"); err != nil {
		c.T.Fatal(err)
	}
	c.nothingLeft(g.asFlat(), "host1")
	c.Eventually("host2 knows nothing of the guest", func() error {
		if info, err := c.Guest("host2", g.Name); err != nil || info != nil {
			return fmt.Errorf("it has %v, %v", info, err)
		}
		return nil
	})
}

// copying starts a migration and holds it where the copying begins.
func (g *linuxGuest) copying() (id string, goOn func()) {
	c := g.c
	c.T.Helper()
	stop := c.Hold(labtest.Point{Role: "source", State: migrate.SourceCopying})
	id = c.start(g.Name, "host1", "host2", nil)
	c.Reached(stop)
	return id, func() { c.Release(stop) }
}
