package deb

import (
	"encoding/json"
	"strconv"
	"strings"
	"testing"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/guest/flat"
	"github.com/lmctl/lmctl/internal/testenv"
)

// guestDisk is a disk that a guest of the tests boots from: it counts, and
// rewrites its memory, for ever.
func guestDisk(t *testing.T) string {
	t.Helper()
	cfg := flat.Config{Memory: 32 << 20, Pages: 500, Rate: flat.Unbounded}
	image, err := cfg.Image()
	if err != nil {
		t.Fatal(err)
	}
	return string(image)
}

const guestDefinition = `name: web
memory: 32MiB
machine: pc
accelerator: kvm
disks:
  - path: /srv/images/web.raw
    format: raw
    bus: ide
`

// processOf is the guest's process, as its host's agent says it.
func (r *root) processOf(guest string) string {
	r.t.Helper()
	var g struct{ PID int }
	if err := json.Unmarshal([]byte(r.do("lmctl", "guest", "show", guest, "--json")), &g); err != nil || g.PID == 0 {
		r.t.Fatalf("guest %s: process %d, %v", guest, g.PID, err)
	}
	return strconv.Itoa(g.PID)
}

// Under systemd the agent waits for its certificate; its guests live in scopes
// of their own, and outlive it, its upgrade and its removal.
func TestUnderSystemd(t *testing.T) {
	testenv.NeedKVM(t)
	testenv.NeedTracker(t, dirtymap.Probe)
	r := newRoot(t)
	deb := r.copyPackage()
	r.put("/srv/images/web.raw", guestDisk(t), 0o600)
	r.put("/root/web.yaml", guestDefinition, 0o600)
	r.boot("host1")

	r.do("dpkg", "-i", deb)
	if out := r.sh("systemctl show -p ActiveState,ConditionResult,UnitFileState lmctl-agent"); out != "ActiveState=inactive\nUnitFileState=enabled\nConditionResult=no" {
		t.Errorf("without a certificate:\n%s", out)
	}
	r.do("lmctl", "pki", "init", "/root/ca")
	r.do("lmctl", "pki", "issue", "--ca", "/root/ca", "--out", "/etc/lmctl/tls", "host1")
	r.do("systemctl", "start", "lmctl-agent") // returns when the agent says that it is ready
	t.Log(r.do("lmctl", "host", "check"))

	r.do("lmctl", "guest", "define", "/root/web.yaml")
	r.do("lmctl", "guest", "start", "web")
	guest := r.processOf("web")
	scope := "lmctl-guest-web-" + guest + ".scope"
	if out := r.do("cat", "/proc/"+guest+"/cgroup"); !strings.Contains(out, "0::/machine.slice/"+scope) {
		t.Errorf("the guest is not in %s:\n%s%s", scope, out, r.journal())
	}
	if out := r.do("systemctl", "show", "-p", "After", "lmctl-agent"); !strings.Contains(out, scope) {
		t.Errorf("at shutdown, the guest may end before the agent: %s", out)
	}

	agent := r.do("systemctl", "show", "-P", "MainPID", "lmctl-agent")
	goesOn := func(after string) {
		t.Helper()
		agent = r.await("another agent after "+after, func(pid string) bool {
			return pid != "0\n" && pid != agent+"\n" && r.sh("systemctl is-active lmctl-agent || true") == "active"
		}, "systemctl", "show", "-P", "MainPID", "lmctl-agent")
		if got := r.processOf("web"); got != guest {
			t.Errorf("after %s the guest is process %s, not %s", after, got, guest)
		}
		if out := r.do("lmctl", "guest", "list"); !strings.Contains(out, "running") {
			t.Errorf("after %s:\n%s", after, out)
		}
	}
	r.do("systemctl", "restart", "lmctl-agent")
	goesOn("a restart")
	r.do("systemctl", "kill", "--kill-whom=main", "-s", "KILL", "lmctl-agent")
	goesOn("its death")
	r.do("dpkg", "-i", deb)
	goesOn("an upgrade")

	if out := r.do("dpkg", "-r", "lmctl"); !strings.Contains(out, "guest web runs on, as process "+guest) {
		t.Errorf("the removal says nothing of the guest:\n%s", out)
	}
	if out := r.do("dpkg", "-P", "lmctl"); !strings.Contains(out, "are left") {
		t.Errorf("the purge says nothing of the guest:\n%s", out)
	}
	r.sh("test -d /proc/" + guest + " && test -e /var/lib/lmctl/guests/web/definition.yaml && test ! -e /etc/lmctl")
	r.do("systemctl", "stop", scope)
	r.sh("test ! -d /proc/" + guest)
}
