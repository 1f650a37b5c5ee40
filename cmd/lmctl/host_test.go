package main

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
)

// List implements lmctlv1.HostsServer. The brief list has one that would not
// answer if it were asked.
func (h fakeHosts) List(_ context.Context, r *lmctlv1.ListHostsRequest) (*lmctlv1.ListHostsResponse, error) {
	if r.Brief {
		return &lmctlv1.ListHostsResponse{Hosts: []*lmctlv1.Host{
			{Name: "host1", Self: true}, {Name: "host2", Address: "192.0.2.2:7410"}, {Name: "other", Address: "192.0.2.3:7410"},
		}}, nil
	}
	return &lmctlv1.ListHostsResponse{Hosts: []*lmctlv1.Host{
		{Name: "host1", Self: true, Reachable: true, MemoryBytes: 1 << 40},
		{Name: "host2", Reachable: true, RoundTrip: durationpb.New(1500 * time.Microsecond)},
	}}, nil
}

// TestHostListJSON: the list is an array, and its numbers are numbers.
func TestHostListJSON(t *testing.T) {
	socket := (&fakeAgent{}).serve(t)
	code, out, errOut := lmctl(t, "host", "list", "--json", "--agent", socket)
	if code != 0 {
		t.Fatalf("code %d, err %q", code, errOut)
	}
	var list []map[string]any
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 2 {
		t.Fatalf("%s: %v", out, err)
	}
	if list[0]["memory_bytes"] != float64(1<<40) || list[0]["self"] != true || list[1]["round_trip_ns"] != 1.5e6 {
		t.Errorf("hosts: %v", list)
	}
}

func TestLabNeedsHosts(t *testing.T) {
	for _, n := range []string{"0", "-1", "1000"} {
		code, _, errOut := lmctl(t, "lab", "up", "--state-dir", t.TempDir(), "--hosts", n)
		if code != exitUsage || !strings.Contains(errOut, "--hosts "+n) {
			t.Errorf("--hosts %s: code %d, err %q", n, code, errOut)
		}
	}
}
