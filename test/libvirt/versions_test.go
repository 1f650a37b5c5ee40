package libvirt

import (
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/lab/domain"
	"github.com/lmctl/lmctl/internal/testenv"
	"github.com/lmctl/lmctl/migrate"
	"github.com/lmctl/lmctl/test/labtest"
)

// olderAndNewer makes a lab of its own: host1 has the machine's own libvirt and
// QEMU, host2 and host3 have libvirt 11 and QEMU 10.
func olderAndNewer(t *testing.T) *cluster {
	t.Helper()
	needs(t)
	newer, err := lab.Unpacked(testenv.NeedLibvirt11(t)...)
	if err != nil {
		t.Fatal(err)
	}
	o := lab.Options{Hosts: 3, MemoryLimit: 1 << 30}
	o.Libvirt.Installations = map[string]lab.Installation{"host2": newer, "host3": newer}
	return ownCluster(t, "versions", o)
}

// versions are what runs on a host, in virsh's words.
type versions struct{ libvirt, qemu string }

func (v versions) String() string { return fmt.Sprintf("libvirt %s, QEMU %s", v.libvirt, v.qemu) }

// atLeast says whether a version is that number or a later one.
func atLeast(version string, major int) bool {
	first, _, _ := strings.Cut(version, ".")
	n, err := strconv.Atoi(first)
	return err == nil && n >= major
}

func (c *cluster) versions(host string) versions {
	c.T.Helper()
	said := c.virsh(host, "version", "--daemon")
	v := versions{field(said, "Running against daemon"), strings.TrimPrefix(field(said, "Running hypervisor"), "QEMU ")}
	if v.libvirt == "" || v.qemu == "" {
		c.T.Fatalf("virsh version on %s:\n%s", host, said)
	}
	return v
}

// Domains move between hosts with libvirt 11 and QEMU 10, and to them from hosts
// with older ones, but not from a newer QEMU to an older.
func TestVersions(t *testing.T) {
	c := olderAndNewer(t)
	for _, host := range []string{"host2", "host3"} {
		if v := c.versions(host); !atLeast(v.libvirt, 11) || !atLeast(v.qemu, 10) {
			t.Fatalf("%s has %s", host, v)
		}
	}
	var moved table
	t.Run("guests", func(t *testing.T) { // ends when all of them have
		for _, shape := range newerShapes {
			t.Run("both new/"+shape.Name, func(t *testing.T) {
				t.Parallel()
				s := c.shape(t, shape, "host2", &moved)
				defer s.remove(s.guest)
				before := s.settings(s.guest, "host2")
				s.leg("host2", "host3", before)
				s.leg("host3", "host2", before)
			})
		}
		t.Run("by virsh", func(t *testing.T) {
			t.Parallel()
			c.arrivalSeen(t)
		})
		t.Run("older to newer", func(t *testing.T) {
			t.Parallel()
			c.upgrade(t, &moved)
		})
	})
	c.interrupted(t)
	t.Logf("moved; host1 has %s, host2 and host3 %s:\n%s", c.versions("host1"), c.versions("host2"), &moved)
}

// newerShapes are moved between hosts with the newer libvirt and QEMU: one with
// each device and two CPUs, one whose memory QEMU has to copy, and one with a disk
// and a network card in use.
var newerShapes = []domain.Case{
	{Name: "new-q35", Memory: 128 << 20, VCPUs: 2, Shape: domain.Shape{
		Machine: "q35", Balloon: true, RNG: true, Watchdog: true, Channel: true, VGA: true,
	}},
	{Name: "new-private", Memory: 64 << 20, VCPUs: 1, Shape: domain.Shape{Backing: domain.Private}},
	{Name: "new-linux", Linux: true, Memory: 256 << 20, VCPUs: 1, Shape: domain.Shape{Machine: "q35", Format: "qcow2"}},
}

// shape starts a guest of a shape on a host.
func (c *cluster) shape(t *testing.T, shape domain.Case, host string, into *table) *shapeCase {
	s := &shapeCase{cluster: c.showing(t), shape: shape, table: into}
	s.why = s.notDirect()
	spec := specOf(shape, 0)
	spec.Name, spec.Host = shape.Name, host
	s.guest = s.start(spec)
	return s
}

// upgrade moves a guest of an older machine from an older QEMU to a newer, where
// it runs on as what it is, and tries to move it back.
func (c *cluster) upgrade(t *testing.T, into *table) {
	older, newer := c.versions("host1"), c.versions("host2")
	if atLeast(older.qemu, 10) {
		testenv.Lacks(t, "a QEMU older than 10", fmt.Errorf("the machine has %s", older))
	}
	const machine = "pc-i440fx-7.2"
	s := c.shape(t, domain.Case{Name: "older-pc", Memory: 128 << 20, VCPUs: 1, Shape: domain.Shape{Machine: machine}}, "host1", into)
	defer s.remove(s.guest)
	// What parameters there are, and with which values, changes with QEMU.
	s.leg("host1", "host2", settings{capabilities: s.settings(s.guest, "host1").capabilities})
	if xml := s.virsh("host2", "dumpxml", s.guest.Name); !strings.Contains(xml, "machine='"+machine+"'") {
		t.Errorf("on host2 it is no %s any more:\n%s", machine, xml)
	}

	why := fmt.Sprintf("QEMU %s here is older than the source's %s; upgrade it", older.qemu, newer.qemu)
	r, err := s.try(s.guest.Name, "host2", "host1")
	if err != nil {
		t.Fatal(err)
	}
	if r.Result != migrate.Refused || !strings.Contains(r.Error, why) {
		t.Errorf("from the newer to the older: %s: %s; wanted a refusal with %q", r.Result, r.Error, why)
	}
	into.add(s.shape.Name, "host2 to host1", fmt.Sprintf("%s: %s", r.Result, r.Error))
	s.healthy(s.guest, "host2")
	s.nothingLeft(s.guest, "host2")
	if known := s.virsh("host1", "list", "--all", "--name"); known != "" {
		t.Errorf("host1 knows %q", known)
	}
	s.ordinary("host2")
	s.leg("host2", "host3", s.settings(s.guest, "host2"))
}

// interrupted ends the destination's agent when all is there: libvirt has made the
// domain one of its own, and yet the source must be able to go on.
func (c *cluster) interrupted(t *testing.T) {
	spec := flatSpec("interrupted", domain.Shape{})
	spec.Host = "host2"
	g := c.start(spec)
	defer c.remove(g)
	stop := c.Hold(labtest.Point{Role: "destination", State: migrate.DestReady})
	if _, err := c.Begin(g.Name, "host2", "host3", &lmctlv1.MigrationOptions{}); err != nil {
		t.Fatal(err)
	}
	c.Reached(stop)
	if err := c.Lab.KillAgent(c.Context(), "host3"); err != nil {
		t.Fatal(err)
	}
	c.Release(stop)
	c.startDaemon("host3", lab.Agent)
	c.known(g, "host2")
	c.healthy(g, "host2")
	c.nothingLeft(g, "host2")
}

// arrivalSeen has virsh move a guest, slowly, to a host whose libvirt tells
// nothing of it before it is there: the agent sees it come all the same, and
// moves it back afterwards.
func (c *cluster) arrivalSeen(t *testing.T) {
	sub := c.showing(t)
	spec := flatSpec("by-virsh", domain.Shape{Backing: domain.Memfd})
	spec.Host = "host2"
	g := sub.start(spec)
	defer sub.remove(g)
	virsh := exec.CommandContext(t.Context(), "virsh", "migrate", "--live", "--unsafe", "--persistent", "--undefinesource",
		"--bandwidth", "1", g.Name, "qemu+tcp://host3/system")
	var said strings.Builder
	virsh.Stdout, virsh.Stderr = &said, &said
	if err := sub.Lab.Start("host2", virsh); err != nil {
		t.Fatal(err)
	}
	over := make(chan error, 1)
	go func() { over <- virsh.Wait() }()
	sub.Eventually("the agent sees it come", func() error {
		info, err := sub.Guest("host3", g.Name)
		if err == nil && (info == nil || info.State != "paused") {
			err = fmt.Errorf("it is %v", info)
		}
		return err
	})
	select {
	case err := <-over:
		t.Fatalf("virsh's migration was over when it was seen: %v: %s", err, &said)
	default:
	}
	sub.virsh("host2", "migrate-setspeed", g.Name, "8192")
	if err := <-over; err != nil {
		t.Fatalf("virsh migrate: %v: %s", err, &said)
	}
	sub.known(g, "host3")
	sub.healthy(g, "host3")
	sub.move(g, "host3", "host2")
	sub.healthy(g, "host2")
	sub.nothingLeft(g, "host2")
}
