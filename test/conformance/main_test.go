// Package conformance asks the same of the agents of both hypervisors: whoever
// uses lmctl must not have to know which one runs a guest.
package conformance

import (
	"errors"
	"path/filepath"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/testenv"
	"github.com/lmctl/lmctl/migrate"
	"github.com/lmctl/lmctl/test/labtest"
)

// suite is a lab of one hypervisor, as one test uses it.
type suite struct{ *labtest.Cluster }

func TestConformance(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedKVM(t)
	testenv.NeedTracker(t, dirtymap.Probe)
	dir := t.TempDir()
	binary, err := labtest.Build(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range []lab.Hypervisor{lab.QEMU, lab.Libvirt} {
		t.Run(string(h), func(t *testing.T) {
			t.Parallel()
			if h == lab.Libvirt {
				testenv.NeedTool(t, "virsh")
			}
			hosts := labtest.Up(t, lab.Options{Dir: filepath.Join(dir, string(h)), Hosts: 2, Binary: binary, Hypervisor: h})
			for _, c := range cases {
				t.Run(c.name, func(t *testing.T) { c.run(&suite{hosts.Showing(t)}) })
			}
		})
	}
}

// start has a small flat guest run on host1 until the test's end.
func (s *suite) start() lab.Guest {
	s.T.Helper()
	g, err := s.Lab.StartGuest(s.T.Context(), lab.GuestSpec{
		Name: "conforms", Kind: lab.Flat, Host: "host1", Memory: 64 << 20, WorkingSet: 8 << 20, DirtyRate: 4 << 20,
	}, func(what string) { s.T.Log(what) })
	if err != nil {
		s.T.Fatal(err)
	}
	s.T.Cleanup(func() {
		if err := s.Lab.RemoveGuest(s.Context(), g.Name); err != nil {
			s.T.Error(err)
		}
	})
	return g
}

// on is a guest as a host's agent describes it; nil if it has none of that name.
func (s *suite) on(host, name string) *lmctlv1.Guest {
	s.T.Helper()
	g, err := s.Guest(host, name)
	if err != nil {
		s.T.Fatal(err)
	}
	return g
}

// await follows a guest on a host by the agent's events until it is as wanted,
// and returns all the states that were told of.
func (s *suite) await(host, name string, wanted func(*lmctlv1.GuestEvent) bool) []string {
	s.T.Helper()
	events, err := s.Clients[host].Guests.Watch(s.Context(), &lmctlv1.WatchGuestsRequest{Name: name})
	if err != nil {
		s.T.Fatal(err)
	}
	var states []string
	for {
		e, err := events.Recv()
		if err != nil {
			s.T.Fatalf("watch %s on %s: %v, after %q", name, host, err, states)
		}
		if states = append(states, e.Guest.State); wanted(e) {
			return states
		}
	}
}

func inState(state string) func(*lmctlv1.GuestEvent) bool {
	return func(e *lmctlv1.GuestEvent) bool { return !e.Removed && e.Guest.State == state }
}

// healthy has the guest check its memory and go on, on this host.
func (s *suite) healthy(g lab.Guest, host string) {
	s.T.Helper()
	v, err := s.Lab.CheckGuest(s.Context(), g.Name)
	if err != nil || !v.OK || v.Host != host {
		s.T.Fatalf("guest on %s, wanted on %s: %q (%v)", v.Host, host, v.Problems, err)
	}
}

// begin starts a migration from host1 to host2.
func (s *suite) begin(g lab.Guest, options *lmctlv1.MigrationOptions) string {
	s.T.Helper()
	id, err := s.Begin(g.Name, "host1", "host2", options)
	if err != nil {
		s.T.Fatal(err)
	}
	return id
}

// report waits for a migration's end.
func (s *suite) report(host, id string) *migrate.Report {
	s.T.Helper()
	r, err := s.Wait(host, id)
	if err != nil {
		s.T.Fatal(err)
	}
	return r
}

// refused checks the code of an error that an agent answered with.
func (s *suite) refused(what string, err error, want codes.Code) *api.Error {
	s.T.Helper()
	var e *api.Error
	if !errors.As(err, &e) || e.Code != want || e.Cause == "" || e.Operation == "" {
		s.T.Fatalf("%s: %v (%+v), wanted %v", what, err, e, want)
	}
	return e
}
