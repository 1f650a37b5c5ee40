package qemu

import (
	"strings"
	"testing"
)

func TestUnitOfCgroup(t *testing.T) {
	for _, c := range []struct{ name, cgroup, want string }{
		{"unified", "0::/system.slice/lmctl-agent.service\n", "lmctl-agent.service"},
		{"hybrid", "12:pids:/system.slice/other.service\n1:name=systemd:/system.slice/lmctl-agent.service\n0::/\n", "lmctl-agent.service"},
		{"below a user's manager", "0::/user.slice/user-0.slice/user@0.service/app.slice/agent.service\n", "agent.service"},
		{"a login", "0::/user.slice/user-0.slice/session-3.scope\n", ""},
		{"no systemd", "3:cpu:/\n0::/\n", ""},
		{"nothing", "", ""},
		{"nonsense", "::\n0\n\n0::lmctl\n", ""},
	} {
		if got := unitOf(c.cgroup); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestScopeName(t *testing.T) {
	if got, want := scopeName("web-1.example", 42), `lmctl-guest-web\x2d1.example-42.scope`; got != want {
		t.Errorf("scopeName: %s, want %s", got, want)
	}
}

func TestScopeProperties(t *testing.T) {
	got := map[string]string{}
	for _, p := range scopeProperties("web", 42, "lmctl-agent.service") {
		got[p.Name] = p.Value.String()
	}
	for name, want := range map[string]string{
		"PIDs": "@au [42]", "Slice": `"machine.slice"`, "Before": `["lmctl-agent.service"]`,
		"Description": `"lmctl guest web"`, "TasksMax": "@t 18446744073709551615",
	} {
		if got[name] != want {
			t.Errorf("%s is %s, want %s", name, got[name], want)
		}
	}
}

// A process that is no unit of systemd asks nothing of it.
func TestNoUnit(t *testing.T) {
	t.Setenv("SYSTEMD_EXEC_PID", "1")
	name, err := ownUnit()
	if err != nil || name != "" {
		t.Errorf("ownUnit: %q, %v", name, err)
	}
}

// The agent asks systemd alone, and says what it asked for when that fails.
func TestScopeWithoutABus(t *testing.T) {
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+t.TempDir()+"/none")
	err := startScope(t.Context(), "lmctl-guest-web-42.scope", nil)
	if err == nil || !strings.Contains(err.Error(), "lmctl-guest-web-42.scope") {
		t.Errorf("startScope without a bus: %v", err)
	}
}
