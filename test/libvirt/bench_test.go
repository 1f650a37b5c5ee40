package libvirt

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/lmctl/lmctl/bench"
	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/internal/testenv"
)

// The bench at its smallest: lmctl takes a domain away and virsh brings it back,
// both are measured, and the guest is healthy. How long anything took is not
// asked.
func TestBench(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedKVM(t)
	testenv.NeedTracker(t, dirtymap.Probe)
	testenv.NeedTool(t, "virsh")
	dir := filepath.Join(t.TempDir(), "lab")
	cmd := exec.CommandContext(t.Context(), work.binary, "bench", "libvirt", "--smallest", "--json", "--dir", dir)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it cleans up
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, said.String())
	}
	var r bench.Report
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	if len(r.Results) != 2 || len(r.Results[0].Samples) != 1 || len(r.Results[1].Samples) != 1 || r.Machine.Libvirt == "" {
		t.Fatalf("%+v", r)
	}
	ours, theirs := r.Results[0].Samples[0], r.Results[1].Samples[0]
	if ours.Source != theirs.Destination || ours.Destination != theirs.Source || !theirs.Started.After(ours.Started) {
		t.Errorf("lmctl from %s to %s, then virsh from %s to %s", ours.Source, ours.Destination, theirs.Source, theirs.Destination)
	}
	for who, s := range map[string]bench.Sample{"lmctl": ours, "virsh": theirs} {
		if !s.Healthy || s.Error != "" || s.Problem != "" {
			t.Errorf("%s: %+v", who, s)
		}
		// Both move what the guest writes, 8 MiB, over the network, and tell of it.
		if s.Switchover <= 0 || s.Downtime < s.Switchover || s.Total < s.Downtime || s.Bytes < 8<<20 || s.Own.Downtime <= 0 || s.Own.Passes < 1 {
			t.Errorf("%s: %+v", who, s)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) > 0 {
		t.Errorf("left in %s: %q, %v", dir, left, err)
	}
}
