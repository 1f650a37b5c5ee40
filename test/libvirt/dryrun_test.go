package libvirt

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/lab/domain"
)

// lan is a network of libvirt's on the lab's own bridge.
const lan = `<network><name>lan</name><forward mode="bridge"/><bridge name="br0"/></network>`

// A dry run says what the destination lacks, one thing after the other, until it
// has all of it; it leaves nothing, and the migration is as it says.
func TestDryRun(t *testing.T) {
	c := newCluster(t)
	c = c.showing(t)
	g := c.start(lab.GuestSpec{Name: "asked", Kind: lab.Flat, Host: "host1", Memory: 128 << 20, VCPUs: 1, Shape: domain.Shape{Machine: "q35"}})
	defer c.remove(g)
	files := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(files, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	network := write("lan.xml", lan)
	for _, host := range c.Lab.Hosts() {
		c.virsh(host, "net-define", network)
		defer func() { c.virsh(host, "net-undefine", "lan") }()
	}
	c.virsh("host1", "net-start", "lan")
	defer func() { c.virsh("host1", "net-destroy", "lan") }()

	told, before := c.settings(g, "host1"), c.virsh("host1", "dumpxml", g.Name)
	verdict := func(failing ...string) *lmctlv1.MigrationVerdict {
		t.Helper()
		v, err := c.Clients["host1"].Migrations.Check(c.Context(), &lmctlv1.StartMigrationRequest{Guest: g.Name, Destination: "host2"})
		if err != nil {
			t.Fatal(err)
		}
		var failed []string
		for _, l := range append(v.Source, v.Destination...) {
			if l.Verdict == lmctlv1.CheckLine_VERDICT_FAIL {
				failed = append(failed, l.Name+": "+l.Detail)
			}
		}
		if len(failed) != len(failing) || v.Ok != (len(failing) == 0) {
			t.Errorf("fails %q, wanted %q", failed, failing)
		}
		for _, want := range failing {
			if !strings.Contains(strings.Join(failed, "\n"), want) {
				t.Errorf("fails %q, wanted %q", failed, want)
			}
		}
		return v
	}
	v := verdict()
	for _, name := range []string{"memory backing", "machine type", "CPU", "memory", "memory folder", "security", "name and UUID"} {
		if !hasLine(v, name) {
			t.Errorf("no line of %s in %v", name, v)
		}
	}
	c.nothingLeft(g, "host1")
	c.sameSettings(g, "host1", told)
	if now := c.virsh("host1", "dumpxml", g.Name); now != before {
		t.Errorf("its XML was\n%s\nand is\n%s", before, now)
	}
	if info := c.virsh("host1", "domjobinfo", g.Name); !strings.Contains(info, "None") {
		t.Errorf("a job is left: %s", info)
	}

	taken := write("taken.xml", `<domain type="qemu"><name>`+g.Name+`</name><memory>1024</memory><os><type arch="x86_64">hvm</type></os></domain>`)
	c.virsh("host2", "define", taken)
	verdict("a guest of this name is this host's", "there is already a guest named "+g.Name)
	c.virsh("host2", "undefine", g.Name)

	card := write("card.xml", `<interface type="network"><source network="lan"/><model type="virtio"/></interface>`)
	c.virsh("host1", "attach-device", g.Name, card, "--live")
	verdict("libvirt's network lan is not active")
	c.virsh("host2", "net-start", "lan")
	defer func() { c.virsh("host2", "net-destroy", "lan") }()
	verdict()
	c.healthy(g, "host1")
	c.move(g, "host1", "host2")
	c.healthy(g, "host2")
}

// A dry run chooses the mode as the migration does.
func TestDryRunMode(t *testing.T) {
	c := newCluster(t)
	c = c.showing(t)
	g := c.start(lab.GuestSpec{Name: "unshared", Kind: lab.Flat, Host: "host1", Memory: 64 << 20, VCPUs: 1, Shape: domain.Shape{Backing: domain.Private}})
	defer c.remove(g)
	for wanted, mode := range map[string]string{"": "relay", "relay": "relay", "direct": ""} {
		v, err := c.Clients["host1"].Migrations.Check(c.Context(), &lmctlv1.StartMigrationRequest{
			Guest: g.Name, Destination: "host2", Options: &lmctlv1.MigrationOptions{Mode: wanted}})
		if err != nil {
			t.Fatal(err)
		}
		if v.Mode != mode || v.Ok != (mode != "") || v.ModeReason == "" || len(v.Destination) < 5 {
			t.Errorf("wanted %q: %v", wanted, v)
		}
	}
	c.nothingLeft(g, "host1")
	c.healthy(g, "host1")
}

func hasLine(v *lmctlv1.MigrationVerdict, name string) bool {
	for _, l := range append(v.Source, v.Destination...) {
		if l.Name == name && l.Verdict == lmctlv1.CheckLine_VERDICT_PASS {
			return true
		}
	}
	return false
}
