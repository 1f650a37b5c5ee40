package main

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
)

// Check implements lmctlv1.MigrationsServer.
func (m fakeMigrations) Check(_ context.Context, r *lmctlv1.StartMigrationRequest) (*lmctlv1.MigrationVerdict, error) {
	m.f.started = r
	return m.f.verdict, nil
}

func TestDryRun(t *testing.T) {
	verdict := &lmctlv1.MigrationVerdict{
		Mode: "direct", ModeReason: "its memory is in shared files", Ok: true,
		Source:      []*lmctlv1.CheckLine{{Name: "state", Verdict: lmctlv1.CheckLine_VERDICT_PASS, Detail: "running"}},
		Destination: []*lmctlv1.CheckLine{{Name: "bridge br0", Verdict: lmctlv1.CheckLine_VERDICT_WARN, Detail: "it is down", Advice: "set it up"}},
	}
	f := &fakeAgent{verdict: verdict}
	socket := f.serve(t)
	code, out, errOut := lmctl(t, "migrate", "web", "host2", "--dry-run", "--streams", "2", "--agent", socket)
	want := []string{"HOST VERDICT FOUND", "source pass state: running", "destination warn bridge br0: it is down; set it up", "",
		"guest web can move to host2, in mode direct: its memory is in shared files"}
	var got []string
	for line := range strings.Lines(out) {
		got = append(got, strings.Join(strings.Fields(line), " "))
	}
	if code != 0 || errOut != "" || strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("code %d, err %q, out:\n%s", code, errOut, out)
	}
	if f.started.Guest != "web" || f.started.Destination != "host2" || f.started.GetOptions().GetStreams() != 2 {
		t.Errorf("asked for %v", f.started)
	}

	verdict.Ok, verdict.Source[0].Verdict = false, lmctlv1.CheckLine_VERDICT_FAIL
	code, out, _ = lmctl(t, "migrate", "web", "host2", "--dry-run", "--agent", socket)
	if code != exitRefused || !strings.Contains(out, "guest web cannot move to host2") {
		t.Errorf("refused: code %d, out:\n%s", code, out)
	}
	code, out, _ = lmctl(t, "migrate", "web", "host2", "--dry-run", "--json", "--agent", socket)
	var v verdictJSON
	if err := json.Unmarshal([]byte(out), &v); err != nil || code != exitRefused {
		t.Fatalf("code %d: %v in %s", code, err, out)
	}
	if v.OK || v.Guest != "web" || v.Mode != "direct" || v.SourceChecks[0].Verdict != "fail" || v.DestinationChecks[0].Advice != "set it up" {
		t.Errorf("%+v", v)
	}
	if code, _, _ := lmctl(t, "migrate", "web", "host2", "--dry-run", "--detach", "--agent", socket); code != exitUsage {
		t.Errorf("--dry-run --detach: code %d", code)
	}
}
