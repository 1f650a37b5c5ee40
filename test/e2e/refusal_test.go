package e2e

import (
	"context"
	"crypto/tls"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/lmctl/lmctl/guest/flat"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/pki"
	"github.com/lmctl/lmctl/internal/testenv"
	"github.com/lmctl/lmctl/migrate"
	"github.com/lmctl/lmctl/test/labtest"
)

var quiet = flat.Config{Memory: 32 << 20, Pages: 1000, Rate: 5000}

// refused starts a migration that must be refused for a reason, and checks
// that the guest runs on at the source and nothing is at the destination.
func (c *cluster) refused(g *flatGuest, to, reason string) {
	c.T.Helper()
	m, err := c.Clients["host1"].Migrations.Start(c.T.Context(), &lmctlv1.StartMigrationRequest{Guest: g.name, Destination: to, Options: &lmctlv1.MigrationOptions{}})
	var text string
	if err != nil {
		text = err.Error()
	} else {
		r := c.wait("host1", m.Id)
		if r.Result != migrate.Refused {
			c.T.Fatalf("%s: %s, want refused", r.Result, r.Error)
		}
		text = r.Error
	}
	if !strings.Contains(text, reason) {
		c.T.Errorf("refused with %q, want a word of %q", text, reason)
	}
	g.goesOn("host1")
	c.nothingLeft(g, "host1")
}

// TestDestinationLacks takes from the destination what the guest needs, one
// thing after the other.
func TestDestinationLacks(t *testing.T) {
	c := newCluster(t, smallMemory)
	t.Run("bridge", func(t *testing.T) {
		c := c.in(t)
		c.bridgeOn("host1", "br7")
		g := c.startFlat("bridged", "host1", quiet, "- bridge: br7\n")
		defer c.destroy(g)
		c.refused(g, "host2", "br7")
	})
	t.Run("memory", func(t *testing.T) {
		c := c.in(t)
		g := c.startFlat("large", "host1", quiet, "")
		defer c.destroy(g)
		c.fill("host2")
		c.refused(g, "host2", c.Lab.MemoryDir("host2"))
		c.empty("host2")
		c.move("large", "host1", "host2") // and then it fits
		g.goesOn("host2")
	})
	t.Run("name", func(t *testing.T) {
		c := c.in(t)
		g := c.startFlat("same", "host1", quiet, "")
		defer c.destroy(g)
		twin := c.startFlat("same", "host2", quiet, "")
		r := c.wait("host1", c.start("same", "host1", "host2", nil))
		if r.Result != migrate.Refused || !strings.Contains(r.Error, "same") {
			t.Errorf("%s: %s", r.Result, r.Error)
		}
		g.goesOn("host1")
		twin.goesOn("host2")
	})
}

// TestDevicesThatCannotMove starts a guest with a disk that another program
// serves: it writes guest memory unseen by the tracker.
func TestDevicesThatCannotMove(t *testing.T) {
	c := newCluster(t)
	socket := filepath.Join(t.TempDir(), "disk.sock")
	c.serveDisk(socket)
	g := c.startFlat("user", "host1", quiet,
		"extra-arguments: [-chardev, 'socket,id=vu,path="+socket+"', -device, 'vhost-user-blk-pci,chardev=vu']\n")
	c.refused(g, "host2", "vhost-user")
}

// serveDisk runs QEMU's storage daemon with a vhost-user disk.
func (c *cluster) serveDisk(socket string) {
	c.T.Helper()
	image := filepath.Join(c.T.TempDir(), "disk.img")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		c.T.Fatal(err)
	}
	daemon := exec.Command(testenv.NeedTool(c.T, "qemu-storage-daemon"),
		"--blockdev", "driver=file,node-name=disk,filename="+image,
		"--export", "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path="+socket)
	daemon.Stderr = os.Stderr
	if err := daemon.Start(); err != nil {
		c.T.Fatal(err)
	}
	c.T.Cleanup(func() {
		if err := daemon.Process.Kill(); err != nil {
			c.T.Error(err)
		}
		_ = daemon.Wait() // it was killed
	})
	c.Eventually("the storage daemon listens", func() error { _, err := os.Stat(socket); return err })
}

// bridgeOn makes a bridge in a host's namespace.
func (c *cluster) bridgeOn(host, name string) {
	c.T.Helper()
	err := c.Lab.In(host, func() error {
		b := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}
		if err := netlink.LinkAdd(b); err != nil {
			return err
		}
		return netlink.LinkSetUp(b)
	})
	if err != nil {
		c.T.Fatal(err)
	}
}

// TestSecondMigration starts a migration of a guest that is being moved.
func TestSecondMigration(t *testing.T) {
	c := newCluster(t)
	g := c.startFlat("twice", "host1", quiet, "")
	stop := c.Hold(labtest.Point{Role: "source", State: migrate.SourceCopying})
	id := c.start("twice", "host1", "host2", nil)
	c.Reached(stop)
	_, err := c.Clients["host1"].Migrations.Start(t.Context(), &lmctlv1.StartMigrationRequest{Guest: "twice", Destination: "host2"})
	if err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("a second migration: %v", err)
	}
	c.Release(stop)
	if r := c.wait("host1", id); r.Result != migrate.Completed {
		t.Fatalf("the first migration: %s: %s", r.Result, r.Error)
	}
	g.goesOn("host2")
}

// TestWrongPlaces migrates to hosts that are none.
func TestWrongPlaces(t *testing.T) {
	c := newCluster(t)
	g := c.startFlat("stay", "host1", quiet, "")
	c.refused(g, "host1", "host1")
	c.refused(g, "host9", "host9")
	c.refused(g, "../../etc", "etc")
	if _, err := c.Clients["host1"].Migrations.Start(t.Context(), &lmctlv1.StartMigrationRequest{Guest: "no such\nguest", Destination: "host2"}); err == nil {
		t.Error("a guest that does not exist was migrated")
	}
}

// TestOddNames defines guests whose names would be trouble anywhere.
func TestOddNames(t *testing.T) {
	c := newCluster(t)
	for _, name := range []string{"", ".", "..", "a/b", "../x", "a b", "a\x00b", "-rf", "ü", strings.Repeat("a", 65), "$(true)"} {
		yaml := "name: " + quoteYAML(name) + "\nmemory: 32MiB\n"
		if g, err := c.Clients["host1"].Guests.Define(t.Context(), &lmctlv1.DefineRequest{Definition: []byte(yaml)}); err == nil {
			t.Errorf("guest %q was defined: %v", name, g)
		} else if !strings.Contains(err.Error(), "name") {
			t.Errorf("guest %q: %v", name, err)
		}
	}
}

func quoteYAML(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\x00", `\0`).Replace(s) + `"`
}

// TestStrangersAtTheDoor knocks at the agent's port with wrong certificates and
// with noise. Nobody gets in, and a migration still works afterwards.
func TestStrangersAtTheDoor(t *testing.T) {
	c := newCluster(t)
	g := c.startFlat("guarded", "host1", quiet, "")
	addr := c.address("host2")
	foreign := t.TempDir()
	if err := pki.Init(filepath.Join(foreign, "ca")); err != nil {
		t.Fatal(err)
	}
	if err := pki.Issue(filepath.Join(foreign, "ca"), pki.Request{Role: pki.Host, Name: "host1"}, filepath.Join(foreign, "tls")); err != nil {
		t.Fatal(err)
	}
	wrongCA, err := tls.LoadX509KeyPair(filepath.Join(foreign, "tls", pki.CertFile), filepath.Join(foreign, "tls", pki.KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	operator, err := tls.LoadX509KeyPair(filepath.Join(c.Lab.CertDir("operator"), pki.CertFile), filepath.Join(c.Lab.CertDir("operator"), pki.KeyFile))
	for name, cert := range map[string][]tls.Certificate{"no certificate": nil, "another authority's": {wrongCA}, "an operator's": {operator}} {
		if name == "an operator's" && err != nil {
			continue
		}
		if answered := c.knock(addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{migrate.ALPN}, Certificates: cert}); answered {
			t.Errorf("%s got an answer on the data plane", name)
		}
	}
	conn, err := c.Lab.Dial(t.Context(), "client", "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte(strings.Repeat("LMCT noise ", 10_000))); err != nil {
		t.Logf("noise: %v", err)
	}
	conn.Close()
	c.move("guarded", "host1", "host2")
	g.goesOn("host2")
}

// knock makes a TLS connection from the client's namespace, says that it is a
// migration, and reports whether anything came back.
func (c *cluster) knock(addr string, config *tls.Config) bool {
	c.T.Helper()
	ctx, cancel := context.WithTimeout(c.T.Context(), labtest.Patience)
	defer cancel()
	raw, err := c.Lab.Dial(ctx, "client", "tcp", addr)
	if err != nil {
		c.T.Fatal(err)
	}
	defer raw.Close()
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		return false
	}
	if err := conn.SetDeadline(time.Now().Add(labtest.Patience)); err != nil {
		c.T.Fatal(err)
	}
	if _, err := conn.Write([]byte("LMCT\x01\x00\x00\x00aaaaaaaaaaaaaaaa")); err != nil {
		return false
	}
	n, _ := conn.Read(make([]byte, 1))
	return n > 0
}

// address is where a host's agent listens.
func (c *cluster) address(host string) string {
	r, err := c.Clients[host].Hosts.Show(c.T.Context(), &lmctlv1.HostRequest{})
	if err != nil {
		c.T.Fatal(err)
	}
	if _, _, err := net.SplitHostPort(r.Address); err != nil {
		c.T.Fatalf("address of %s: %v", host, err)
	}
	return r.Address
}

// TestDryRun asks whether a guest could move, and sees that what is said comes
// true and that the question leaves nothing.
func TestDryRun(t *testing.T) {
	c := newCluster(t)
	check := func(g *flatGuest) *lmctlv1.MigrationVerdict {
		t.Helper()
		v, err := c.Clients["host1"].Migrations.Check(t.Context(), &lmctlv1.StartMigrationRequest{Guest: g.name, Destination: "host2"})
		if err != nil {
			t.Fatal(err)
		}
		g.goesOn("host1")
		c.nothingLeft(g, "host1")
		return v
	}
	c.bridgeOn("host1", "br8")
	g := c.startFlat("asked", "host1", quiet, "- bridge: br8\n")
	v := check(g)
	if v.Ok || v.Mode != "direct" {
		t.Errorf("without the bridge: %v", v)
	}
	failed := 0
	for _, l := range append(v.Source, v.Destination...) {
		if l.Verdict == lmctlv1.CheckLine_VERDICT_FAIL {
			failed++
			if l.Name != "bridge br8" || !strings.Contains(l.Detail, "no bridge br8") {
				t.Errorf("it fails for %v", l)
			}
		}
	}
	if failed != 1 || len(v.Source) < 4 || len(v.Destination) < 9 {
		t.Errorf("%d lines fail of %v", failed, v)
	}
	c.refused(g, "host2", "br8")
	c.bridgeOn("host2", "br8")
	if v := check(g); !v.Ok {
		t.Errorf("with all it needs: %v", v)
	}
	c.move("asked", "host1", "host2")
	g.goesOn("host2")
}
