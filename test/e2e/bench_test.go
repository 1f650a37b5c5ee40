package e2e

import (
	"testing"

	"github.com/lmctl/lmctl/bench"
	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/testenv"
	"github.com/lmctl/lmctl/test/labtest"
)

// The bench at its smallest: every contender moves a guest, is measured, and
// leaves the guest healthy. How long anything took is not asked.
func TestBench(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedQEMU(t)
	testenv.NeedKVM(t)
	testenv.NeedTracker(t, dirtymap.Probe)
	r := labtest.Bench(t, binary, "quick")
	if len(r.Results) != len(bench.Contenders(lab.QEMU)) {
		t.Fatalf("%d results for %d contenders", len(r.Results), len(bench.Contenders(lab.QEMU)))
	}
	for _, x := range r.Results {
		if len(x.Samples) != 1 {
			t.Errorf("%s: %d samples", x.Contender, len(x.Samples))
			continue
		}
		s := x.Samples[0]
		if !s.Healthy || s.Error != "" || s.Problem != "" {
			t.Errorf("%s: %+v", x.Contender, s)
		}
		if s.Downtime <= 0 || s.Total < s.Downtime || s.Source == s.Destination {
			t.Errorf("%s: %+v", x.Contender, s)
		}
		// Whoever moves memory over the network sends the 8 MiB that the guest
		// writes, and the floor sends none of it.
		if moved := s.Bytes > 8<<20; moved == (x.Contender == "floor") || s.Bytes <= 0 {
			t.Errorf("%s: %d bytes sent", x.Contender, s.Bytes)
		}
	}
}
