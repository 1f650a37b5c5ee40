package deb

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/internal/testenv"
)

func TestVagrantfile(t *testing.T) {
	vagrant := testenv.NeedTool(t, "vagrant")
	dir := t.TempDir()
	// A copy: vagrant leaves things beside what it reads.
	for _, name := range []string{"Vagrantfile", "provision.sh"} {
		text, err := os.ReadFile("../../vagrant/" + name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), vagrant, "validate")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "VAGRANT_HOME="+t.TempDir(), "VAGRANT_DEFAULT_PROVIDER=libvirt", "VAGRANT_CHECKPOINT_DISABLE=1")
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "validated successfully") {
		t.Errorf("vagrant validate: %v\n%s", err, out)
	}
}

// provisioned are n hosts as vagrant up makes them: systems that are booted, on
// a network for agents and one for guests, with one folder of images. NFS is
// left out: /srv/images is one folder by itself.
func provisioned(t *testing.T, n int) []*root {
	t.Helper()
	keys := makeKeys(t)
	images := t.TempDir()
	hosts := make([]*root, n)
	for _, bridge := range []string{"agents", "guests"} {
		outside(t, "ip", "link", "add", bridge, "type", "bridge")
		outside(t, "ip", "link", "set", bridge, "up")
	}
	for i := range hosts {
		name := "host" + strconv.Itoa(i+1)
		r := newRoot(t)
		for from, to := range map[string]string{images: "srv/images", filepath.Join(keys, name): "opt/lmctl/keys"} {
			to = filepath.Join(r.dir, to)
			if err := os.MkdirAll(to, 0o755); err != nil {
				t.Fatal(err)
			}
			outside(t, "mount", "--bind", from, to)
			t.Cleanup(func() { outside(t, "umount", "-l", to) })
		}
		text, err := os.ReadFile(filepath.Join(r.dir, r.copyPackage()))
		if err != nil {
			t.Fatal(err)
		}
		r.put("/opt/lmctl/dist/lmctl_0_amd64.deb", string(text), 0o644)
		script, err := os.ReadFile("../../vagrant/provision.sh")
		if err != nil {
			t.Fatal(err)
		}
		r.put("/root/provision.sh", string(script), 0o755)
		r.boot(name)
		r.plug("agents", "eth1", "")
		r.do("ip", "address", "add", address(i)+"/24", "dev", "eth1")
		r.plug("guests", "eth2", mac(i))
		hosts[i] = r
	}
	for i := range hosts {
		hosts[i].provision(i, n)
	}
	return hosts
}

func address(i int) string { return "192.168.56." + strconv.Itoa(11+i) }
func mac(i int) string     { return "52:54:00:77:10:0" + strconv.Itoa(i+1) }

// provision runs the script as the Vagrantfile does.
func (r *root) provision(i, n int) string {
	r.t.Helper()
	args := []string{
		"/root/provision.sh", "--name", "host" + strconv.Itoa(i+1), "--address", address(i),
		"--package", "/opt/lmctl/dist", "--keys", "/opt/lmctl/keys", "--bridge-mac", mac(i),
		"--bridge-address", "10.77.0." + strconv.Itoa(i+1) + "/24", "--images", "local",
	}
	for peer := range n {
		if peer != i {
			args = append(args, "--peer", "host"+strconv.Itoa(peer+1)+"="+address(peer))
		}
	}
	return r.do(args...)
}

// plug connects the booted root to a bridge of the test's.
func (r *root) plug(bridge, card, mac string) {
	r.t.Helper()
	pid := strconv.Itoa(r.pid)
	outside(r.t, "ip", "link", "add", "v"+card+"-"+pid, "master", bridge, "type", "veth", "peer", "name", card, "netns", pid)
	outside(r.t, "ip", "link", "set", "v"+card+"-"+pid, "up")
	if mac != "" {
		r.do("ip", "link", "set", card, "address", mac)
	}
	r.do("ip", "link", "set", card, "up")
}

// outside runs a command in the test's own namespaces.
func outside(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func makeKeys(t *testing.T) string {
	t.Helper()
	if _, err := os.Stat("../../bin/lmctl"); err != nil {
		testenv.Missing(t, "bin/lmctl (make build)", err)
	}
	dir := t.TempDir()
	for range 2 { // the second finds all there
		outside(t, "../../vagrant/make-keys", dir)
	}
	return dir
}

// The hosts of the Vagrantfile, without Vagrant: the script makes them, makes
// them again, and a guest moves between them under their systemd.
func TestProvisionedHosts(t *testing.T) {
	testenv.NeedKVM(t)
	testenv.NeedTracker(t, dirtymap.Probe)
	hosts := provisioned(t, 2)
	one, two := hosts[0], hosts[1]
	before := one.do("systemctl", "show", "-P", "MainPID", "lmctl-agent")
	if out := one.provision(0, 2); strings.Contains(out, "Unpacking") {
		t.Errorf("the second run installs again:\n%s", out)
	}
	if after := one.do("systemctl", "show", "-P", "MainPID", "lmctl-agent"); after != before {
		t.Errorf("the second run restarts the agent: process %s, now %s", before, after)
	}
	one.do("ip", "link", "show", "master", "br0", "dev", "eth2")
	one.do("sh", "-c", "getent hosts host2 && ip -4 address show br0 | grep -q 10.77.0.1/24")

	one.put("/srv/images/web.raw", guestDisk(t), 0o600)
	one.put("/root/web.yaml", guestDefinition+"nics:\n  - bridge: br0\n    addresses: [10.77.0.100]\n", 0o600)
	one.do("lmctl", "guest", "define", "/root/web.yaml")
	one.do("lmctl", "guest", "start", "web")
	for i, from := range hosts {
		to := hosts[1-i]
		var report struct {
			Result        string `json:"result"`
			VerifiedPages int    `json:"verified_pages"`
		}
		out := from.do("lmctl", "migrate", "web", "host"+strconv.Itoa(2-i), "--verify", "--json")
		if err := json.Unmarshal([]byte(out), &report); err != nil || report.Result != "completed" || report.VerifiedPages == 0 {
			t.Fatalf("migration from host%d: %v\n%s", i+1, err, out)
		}
		guest := to.processOf("web")
		if out := to.do("cat", "/proc/"+guest+"/cgroup"); !strings.Contains(out, "lmctl-guest-web-"+guest+".scope") {
			t.Errorf("the guest that moved is not in a scope of its own:\n%s", out)
		}
	}
	if out := two.sh("curl -s http://" + address(1) + ":9410/metrics"); !strings.Contains(out, "lmctl_migrations_total") {
		t.Errorf("the metrics know of no migration:\n%s", out)
	}
}
