// Package conformance asks the same of the agents of both hypervisors: whoever
// uses lmctl must not have to know which one runs a guest.
package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/testenv"
	"github.com/lmctl/lmctl/migrate"
)

// patience is how long a test waits for what must come. It is no measure of
// speed: machines that run tests are slow and shared.
const patience = 60 * time.Second

// suite is a lab of one hypervisor, as one test uses it.
type suite struct {
	t       *testing.T
	lab     *lab.Lab
	clients map[string]*api.Client
}

func TestConformance(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedKVM(t)
	testenv.NeedTracker(t, dirtymap.Probe)
	dir := t.TempDir()
	binary := filepath.Join(dir, "lmctl")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", binary, "github.com/lmctl/lmctl/cmd/lmctl")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build lmctl: %v: %s", err, out)
	}
	for _, h := range []lab.Hypervisor{lab.QEMU, lab.Libvirt} {
		t.Run(string(h), func(t *testing.T) {
			t.Parallel()
			if h == lab.Libvirt {
				testenv.NeedTool(t, "virsh")
			}
			l, err := lab.Up(t.Context(), lab.Options{Dir: filepath.Join(dir, string(h)), Hosts: 2, Binary: binary, Hypervisor: h})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				defer cancel()
				if err := lab.Down(ctx, l.Dir()); err != nil {
					t.Error(err)
				}
			})
			for _, c := range cases {
				t.Run(c.name, func(t *testing.T) { c.run(newSuite(t, l)) })
			}
		})
	}
}

func newSuite(t *testing.T, l *lab.Lab) *suite {
	s := &suite{t: t, lab: l, clients: make(map[string]*api.Client)}
	for _, host := range l.Hosts() {
		c, err := api.Dial(api.Target{Socket: l.AgentSocket(host)})
		if err != nil {
			t.Fatal(err)
		}
		s.clients[host] = c
		t.Cleanup(func() {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	return s
}

// context ends when a test has waited long enough, even for its cleaning up.
func (s *suite) context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	s.t.Cleanup(cancel)
	return ctx
}

// start has a small flat guest run on host1 until the test's end.
func (s *suite) start() lab.Guest {
	s.t.Helper()
	g, err := s.lab.StartGuest(s.t.Context(), lab.GuestSpec{
		Name: "conforms", Kind: lab.Flat, Host: "host1", Memory: 64 << 20, WorkingSet: 8 << 20, DirtyRate: 4 << 20,
	}, func(what string) { s.t.Log(what) })
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := s.lab.RemoveGuest(s.context(), g.Name); err != nil {
			s.t.Error(err)
		}
	})
	return g
}

// on is a guest as a host's agent describes it; nil if it has none of that name.
func (s *suite) on(host, name string) *lmctlv1.Guest {
	s.t.Helper()
	list, err := s.clients[host].Guests.List(s.context(), &lmctlv1.ListGuestsRequest{})
	if err != nil {
		s.t.Fatal(err)
	}
	for _, g := range list.Guests {
		if g.Name == name {
			return g
		}
	}
	return nil
}

// await follows a guest on a host by the agent's events until it is as wanted,
// and returns all the states that were told of.
func (s *suite) await(host, name string, wanted func(*lmctlv1.GuestEvent) bool) []string {
	s.t.Helper()
	events, err := s.clients[host].Guests.Watch(s.context(), &lmctlv1.WatchGuestsRequest{Name: name})
	if err != nil {
		s.t.Fatal(err)
	}
	var states []string
	for {
		e, err := events.Recv()
		if err != nil {
			s.t.Fatalf("watch %s on %s: %v, after %q", name, host, err, states)
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
	s.t.Helper()
	v, err := s.lab.CheckGuest(s.context(), g.Name)
	if err != nil || !v.OK || v.Host != host {
		s.t.Fatalf("guest on %s, wanted on %s: %q (%v)", v.Host, host, v.Problems, err)
	}
}

// begin starts a migration from host1 to host2.
func (s *suite) begin(g lab.Guest, options *lmctlv1.MigrationOptions) string {
	s.t.Helper()
	m, err := s.clients["host1"].Migrations.Start(s.context(), &lmctlv1.StartMigrationRequest{Guest: g.Name, Destination: "host2", Options: options})
	if err != nil {
		s.t.Fatal(err)
	}
	return m.Id
}

// follow watches a migration until it is over, or until enough has been seen.
func (s *suite) follow(host, id string, enough func(*lmctlv1.Migration) bool) *lmctlv1.Migration {
	s.t.Helper()
	stream, err := s.clients[host].Migrations.Watch(s.context(), &lmctlv1.MigrationRequest{Id: id})
	if err != nil {
		s.t.Fatal(err)
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			s.t.Fatalf("watch migration %s: %v", id, err)
		}
		if m.Finished || enough(m) {
			return m
		}
	}
}

// report waits for a migration's end.
func (s *suite) report(host, id string) *migrate.Report {
	s.t.Helper()
	m := s.follow(host, id, func(*lmctlv1.Migration) bool { return false })
	var r migrate.Report
	if err := json.Unmarshal(m.Report, &r); err != nil {
		s.t.Fatal(err)
	}
	return &r
}

// refused checks the code of an error that an agent answered with.
func (s *suite) refused(what string, err error, want codes.Code) *api.Error {
	s.t.Helper()
	var e *api.Error
	if !errors.As(err, &e) || e.Code != want || e.Cause == "" || e.Operation == "" {
		s.t.Fatalf("%s: %v (%+v), wanted %v", what, err, e, want)
	}
	return e
}
