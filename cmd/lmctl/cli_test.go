package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/migrate"
)

// fakeAgent answers as a test wants: the command line's own behaviour is what
// is tested here, and no real agent can be made to give each answer.
type fakeAgent struct {
	startErr error
	report   migrate.Report
	started  *lmctlv1.StartMigrationRequest
	guests   []*lmctlv1.Guest
	moves    []*lmctlv1.Migration
	lines    []*lmctlv1.CheckLine
	verdict  *lmctlv1.MigrationVerdict
	hold     chan struct{} // Watch waits for it before it ends
	watching chan struct{}
	canceled chan struct{}
}

type fakeGuests struct {
	lmctlv1.UnimplementedGuestsServer
	f *fakeAgent
}

func (g fakeGuests) List(context.Context, *lmctlv1.ListGuestsRequest) (*lmctlv1.ListGuestsResponse, error) {
	return &lmctlv1.ListGuestsResponse{Guests: g.f.guests}, nil
}

type fakeMigrations struct {
	lmctlv1.UnimplementedMigrationsServer
	f *fakeAgent
}

func (m fakeMigrations) Start(_ context.Context, r *lmctlv1.StartMigrationRequest) (*lmctlv1.Migration, error) {
	f := m.f
	f.started = r
	if f.startErr != nil {
		return nil, f.startErr
	}
	return &lmctlv1.Migration{Id: "m1", Guest: r.Guest, Destination: r.Destination}, nil
}

func (m fakeMigrations) List(context.Context, *lmctlv1.ListMigrationsRequest) (*lmctlv1.ListMigrationsResponse, error) {
	return &lmctlv1.ListMigrationsResponse{Migrations: m.f.moves}, nil
}

func (m fakeMigrations) Watch(_ *lmctlv1.MigrationRequest, s grpc.ServerStreamingServer[lmctlv1.Migration]) error {
	f := m.f
	passes := []*lmctlv1.Pass{{N: 1, Pages: 1000, ZeroPages: 10, Bytes: 4 << 20, Duration: durationpb.New(time.Second), DirtyAfter: 7}}
	first := &lmctlv1.Migration{Id: "m1", Guest: "web", State: "copying", Started: timestamppb.Now(), Progress: &lmctlv1.Progress{Pass: 2, PassPages: 10, CopiedPages: 5, Rate: 1e6, Passes: passes}}
	if err := s.Send(first); err != nil {
		return err
	}
	if f.watching != nil {
		close(f.watching)
		<-f.hold
	}
	report, err := json.Marshal(f.report)
	if err != nil {
		return err
	}
	return s.Send(&lmctlv1.Migration{Id: "m1", Guest: "web", Finished: true, State: "done", Started: first.Started, Progress: first.Progress, Report: report})
}

func (m fakeMigrations) Cancel(context.Context, *lmctlv1.MigrationRequest) (*lmctlv1.Migration, error) {
	close(m.f.canceled)
	close(m.f.hold)
	return &lmctlv1.Migration{Id: "m1"}, nil
}

type fakeHosts struct {
	lmctlv1.UnimplementedHostsServer
	f *fakeAgent
}

func (h fakeHosts) Check(context.Context, *lmctlv1.CheckRequest) (*lmctlv1.CheckResponse, error) {
	return &lmctlv1.CheckResponse{Lines: h.f.lines}, nil
}

// serve starts the fake agent and returns its socket.
func (f *fakeAgent) serve(t *testing.T) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "agent.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	lmctlv1.RegisterGuestsServer(s, fakeGuests{f: f})
	lmctlv1.RegisterMigrationsServer(s, fakeMigrations{f: f})
	lmctlv1.RegisterHostsServer(s, fakeHosts{f: f})
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return socket
}

// lmctl runs the command line and returns its exit code and outputs.
func lmctl(t *testing.T, args ...string) (code int, out, errOut string) {
	t.Helper()
	var o, e bytes.Buffer
	code = run(t.Context(), args, streams{in: strings.NewReader(""), out: &o, err: &e})
	return code, o.String(), e.String()
}

func TestUsageErrors(t *testing.T) {
	for _, args := range [][]string{
		{"frobnicate"}, {"migrate"}, {"migrate", "web"}, {"migrate", "web", "host2", "extra"},
		{"migrate", "web", "host2", "--max-passes", "many"}, {"migrate", "web", "host2", "--bandwidth", "fast"},
		{"guest", "frobnicate"}, {"guest", "start"}, {"--no-such-flag"}, {"pki", "issue"},
		{"guest", "list", "--agent", "nowhere"}, {"migrate", "web", "host2", "--streams", "17"},
		{"migrate", "web", "host2", "--max-passes", "0"}, {"migrate", "web", "host2", "--timeout", "-1s"},
	} {
		code, out, errOut := lmctl(t, args...)
		if code != exitUsage || !strings.HasPrefix(errOut, "lmctl: ") || strings.Count(errOut, "\n") != 1 || out != "" {
			t.Errorf("%q: code %d, out %q, err %q", args, code, out, errOut)
		}
	}
}

func TestMigrateExitCodes(t *testing.T) {
	for result, want := range map[migrate.Result]int{
		migrate.Completed: 0, migrate.Refused: 3, migrate.Failed: 4, migrate.Cancelled: 4, migrate.InDoubt: 5,
	} {
		f := &fakeAgent{report: migrate.Report{ID: "m1", Guest: "web", Destination: "host2", Result: result, Error: "why not"}}
		socket := f.serve(t)
		code, out, errOut := lmctl(t, "migrate", "web", "host2", "--agent", socket)
		if code != want || !strings.Contains(out, "pass 1") {
			t.Errorf("%s: code %d, out %q", result, code, out)
		}
		if want != 0 && (!strings.Contains(errOut, "why not") || strings.Count(errOut, "\n") != 1) {
			t.Errorf("%s: err %q", result, errOut)
		}
		code, out, errOut = lmctl(t, "migrate", "web", "host2", "--agent", socket, "--json")
		var r migrate.Report
		if err := json.Unmarshal([]byte(out), &r); err != nil || r.Result != result || code != want || errOut != "" {
			t.Errorf("%s with --json: code %d, out %q, err %q, %v", result, code, out, errOut, err)
		}
	}
}

func TestMigrateRefusedAtOnce(t *testing.T) {
	f := &fakeAgent{startErr: &api.Error{Code: codes.FailedPrecondition, Operation: "migrate guest", Object: "web", Cause: "no such host", Result: "refused", Reasons: []string{"no such host"}}}
	socket := f.serve(t)
	code, out, errOut := lmctl(t, "migrate", "web", "host9", "--agent", socket)
	if code != exitRefused || out != "" || errOut != "lmctl: migrate guest web: no such host\n" {
		t.Errorf("code %d, out %q, err %q", code, out, errOut)
	}
	code, out, _ = lmctl(t, "migrate", "web", "host9", "--agent", socket, "--json")
	var r migrate.Report
	if err := json.Unmarshal([]byte(out), &r); err != nil || code != exitRefused || r.Result != migrate.Refused || r.Guest != "web" || r.Error != "no such host" {
		t.Errorf("code %d, out %q, %v", code, out, err)
	}
	f.startErr = &api.Error{Code: codes.NotFound, Operation: "find guest", Object: "web", Cause: "there is none"}
	code, out, _ = lmctl(t, "migrate", "web", "host9", "--agent", socket, "--json")
	var obj struct{ Error errorObject }
	if err := json.Unmarshal([]byte(out), &obj); err != nil || code != exitOther || obj.Error.ExitCode != exitOther || obj.Error.Object != "web" {
		t.Errorf("code %d, out %q, %v", code, out, err)
	}
}

func TestMigrateOptions(t *testing.T) {
	f := &fakeAgent{report: migrate.Report{Result: migrate.Completed}}
	socket := f.serve(t)
	if code, _, errOut := lmctl(t, "migrate", "web", "host2", "--agent", socket); code != 0 {
		t.Fatal(errOut)
	}
	if o := f.started.Options; o.MaxPasses != nil || o.Bandwidth != nil || o.Streams != nil || o.DowntimeTarget != nil || o.Timeout != nil || o.Verify {
		t.Errorf("options that were not given: %v", o)
	}
	code, out, errOut := lmctl(t, "migrate", "web", "host2", "--agent", socket, "--max-passes=3", "--bandwidth=100MiB/s",
		"--streams=4", "--downtime-target=10ms", "--timeout=1m", "--verify", "--detach")
	if code != 0 || out != "m1\n" {
		t.Fatalf("code %d, out %q, err %q", code, out, errOut)
	}
	o := f.started.Options
	if o.GetMaxPasses() != 3 || o.GetBandwidth() != 100<<20 || o.GetStreams() != 4 || o.DowntimeTarget.AsDuration() != 10*time.Millisecond || o.Timeout.AsDuration() != time.Minute || !o.Verify {
		t.Errorf("options: %v", o)
	}
}

func TestGuestList(t *testing.T) {
	f := &fakeAgent{guests: []*lmctlv1.Guest{
		{Name: "web", State: "running", MemoryBytes: 2 << 30, Vcpus: 2, Accelerator: "kvm"},
		{Name: "db", State: "in-doubt", Advice: "host2 may run it; when it is gone for good: lmctl guest claim db --force"},
		{Name: "old", State: "stopped", End: &lmctlv1.End{Cause: "killed", Signal: 9}},
	}}
	socket := f.serve(t)
	code, out, errOut := lmctl(t, "guest", "list", "--agent", socket)
	if code != 0 || errOut != "" {
		t.Fatalf("code %d, err %q", code, errOut)
	}
	for _, want := range []string{"2.0 GiB", "in-doubt", "db: host2 may run it", "killed (signal 9)"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
	_, out, _ = lmctl(t, "guest", "list", "--agent", socket, "--json")
	var list []guestJSON
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 3 || list[2].End.Signal != 9 {
		t.Errorf("%s: %v", out, err)
	}
}

func TestHostCheck(t *testing.T) {
	f := &fakeAgent{lines: []*lmctlv1.CheckLine{{Name: "kernel", Verdict: lmctlv1.CheckLine_VERDICT_PASS, Detail: "6.12"}}}
	socket := f.serve(t)
	if code, out, _ := lmctl(t, "host", "check", "--agent", socket); code != 0 || !strings.Contains(out, "pass") {
		t.Errorf("code %d, out %q", code, out)
	}
	f.lines = append(f.lines, &lmctlv1.CheckLine{Name: "bridge", Verdict: lmctlv1.CheckLine_VERDICT_FAIL, Detail: "none", Advice: "make one"})
	if code, out, _ := lmctl(t, "host", "check", "--agent", socket); code != exitOther || !strings.Contains(out, "make one") {
		t.Errorf("code %d, out %q", code, out)
	}
}

func TestNoAgent(t *testing.T) {
	code, _, errOut := lmctl(t, "guest", "list", "--agent", filepath.Join(t.TempDir(), "none.sock"))
	if code != exitOther || !strings.HasPrefix(errOut, "lmctl: ") || strings.Count(errOut, "\n") != 1 {
		t.Errorf("code %d, err %q", code, errOut)
	}
}

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{"512MiB": 512 << 20, "1048576": 1 << 20, "2GB": 2e9, "0": 0} {
		if got, err := parseSize(text); err != nil || got != want {
			t.Errorf("%q is %d, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "fast", "-1", "9999999999GiB"} {
		if got, err := parseSize(text); err == nil {
			t.Errorf("%q is taken as %d", text, got)
		}
	}
}

// TestInterruptCancels sends the process the signal that Ctrl-C sends.
func TestInterruptCancels(t *testing.T) {
	f := &fakeAgent{
		report: migrate.Report{Result: migrate.Cancelled, Error: "cancelled"},
		hold:   make(chan struct{}), watching: make(chan struct{}), canceled: make(chan struct{}),
	}
	socket := f.serve(t)
	ended := make(chan int, 1)
	var errOut bytes.Buffer
	go func() {
		ended <- run(t.Context(), []string{"migrate", "web", "host2", "--agent", socket}, streams{in: strings.NewReader(""), out: new(bytes.Buffer), err: &errOut})
	}()
	<-f.watching
	if err := syscall.Kill(syscall.Getpid(), syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	<-f.canceled
	if code := <-ended; code != exitFailed || !strings.Contains(errOut.String(), "cancelling") {
		t.Errorf("code %d, err %q", code, errOut.String())
	}
}
