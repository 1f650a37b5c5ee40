package libvirt

import (
	"testing"

	"github.com/lmctl/lmctl/bench"
	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/internal/testenv"
	"github.com/lmctl/lmctl/test/labtest"
)

// The bench at its smallest: lmctl takes a domain away and virsh brings it back,
// both are measured, and the guest is healthy. How long anything took is not
// asked.
func TestBench(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedKVM(t)
	testenv.NeedTracker(t, dirtymap.Probe)
	testenv.NeedTool(t, "virsh")
	r := labtest.Bench(t, work.binary, "libvirt")
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
}
