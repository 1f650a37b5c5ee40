package agent

import (
	"testing"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
)

// The brief list comes from the configuration alone: this agent has no way to
// ask anybody.
func TestBriefHostList(t *testing.T) {
	s := &hostService{a: &Agent{cfg: Config{Name: "host1", Peers: map[string]string{"host3": "192.0.2.3:7410", "host2": "192.0.2.2:7410"}}}}
	r, err := s.List(t.Context(), &lmctlv1.ListHostsRequest{Brief: true})
	if err != nil {
		t.Fatal(err)
	}
	want := []*lmctlv1.Host{{Name: "host1", Self: true}, {Name: "host2", Address: "192.0.2.2:7410"}, {Name: "host3", Address: "192.0.2.3:7410"}}
	if len(r.Hosts) != len(want) {
		t.Fatalf("%d hosts: %v", len(r.Hosts), r.Hosts)
	}
	for i, h := range r.Hosts {
		if h.Name != want[i].Name || h.Address != want[i].Address || h.Self != want[i].Self || h.Reachable {
			t.Errorf("host %d: %v, want %v", i, h, want[i])
		}
	}
}
