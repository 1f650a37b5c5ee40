package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/guest/client"
	"github.com/lmctl/lmctl/guest/linux"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/testenv"
	"github.com/lmctl/lmctl/migrate"
)

// The demo at its smallest: a Linux guest moves there and back, and nobody who
// uses it notices more than a pause.
func TestDemo(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedQEMU(t)
	testenv.NeedTracker(t, dirtymap.Probe)
	init, err := linux.BuildInit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cache, err := linux.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := linux.Prepare(t.Context(), cache, init, func(what string) { t.Log(what) }); err != nil {
		testenv.Missing(t, "Debian's cloud kernel", err)
	}
	testenv.TCG(t)
	path := filepath.Join(t.TempDir(), "init")
	if err := os.WriteFile(path, init, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "lab")
	cmd := exec.CommandContext(t.Context(), binary, "lab", "demo", "--json", "--state-dir", dir,
		"--memory", "256MiB", "--dirty-rate", "20MiB/s", "--verify")
	cmd.Env = append(os.Environ(), "LMCTL_GUEST_INIT="+path)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it cleans up
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s%s", err, said.String(), out)
	}
	var r struct {
		Migrations []migrate.Report `json:"migrations"`
		TCP        client.Numbered  `json:"tcp"`
		UDP        client.Pinged    `json:"udp"`
		Guest      lab.Verdict      `json:"guest"`
	}
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	if len(r.Migrations) != 2 || r.Guest.Host != lab.HostName(1) {
		t.Fatalf("%d migrations, the guest is on %s", len(r.Migrations), r.Guest.Host)
	}
	for _, m := range r.Migrations {
		if m.Result != migrate.Completed || len(m.Passes) == 0 || len(m.Passes) > migrate.DefaultMaxPasses ||
			m.VerifiedPages != m.RAMBytes/migrate.PageSize || m.Announced != 2 {
			t.Errorf("migration: %+v", m)
		}
	}
	if !r.TCP.Whole() || r.TCP.Gap.Length <= 0 {
		t.Errorf("TCP: %+v", r.TCP)
	}
	if r.UDP.Doubled > 0 || r.UDP.Lost == r.UDP.Sent {
		t.Errorf("UDP: %+v", r.UDP)
	}
	if !r.Guest.OK {
		t.Errorf("guest: %+v", r.Guest)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) > 0 {
		t.Errorf("left in %s: %q, %v", dir, left, err)
	}
}
