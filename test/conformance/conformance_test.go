package conformance

import (
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/migrate"
)

var cases = []struct {
	name string
	run  func(*suite)
}{
	{"life", (*suite).life},
	{"not there", (*suite).notThere},
	{"killed", (*suite).killed},
	{"adopted", (*suite).adopted},
	{"move", (*suite).move},
	{"cancel", (*suite).cancel},
	{"refusals", (*suite).refusals},
	{"dry run", (*suite).dryRun},
}

// life starts a guest, ends it and starts it again.
func (s *suite) life() {
	g := s.start()
	c, name := s.Clients["host1"].Guests, &lmctlv1.GuestRequest{Name: g.Name}
	running := s.on("host1", g.Name)
	if running == nil || running.State != "running" || running.Uuid != g.UUID || running.Pid == 0 || running.MemoryBytes != g.Memory ||
		running.Vcpus != 1 || running.Accelerator != "kvm" || running.Ownership.GetState() != "owned" || running.Mode != "direct" || running.ModeReason == "" {
		s.T.Errorf("it is %v", running)
	}
	_, err := c.Start(s.Context(), name)
	s.refused("start it twice", err, codes.FailedPrecondition)
	_, err = c.Undefine(s.Context(), name)
	s.refused("undefine it while it runs", err, codes.FailedPrecondition)
	ended, err := c.Destroy(s.Context(), name)
	if err != nil || ended.State != "stopped" || ended.End.GetCause() != "destroyed" || ended.Pid != 0 {
		s.T.Errorf("destroyed, it is %v (%v)", ended, err)
	}
	_, err = c.Destroy(s.Context(), name)
	s.refused("destroy it twice", err, codes.FailedPrecondition)
	again, err := c.Start(s.Context(), name)
	if err != nil || again.State != "running" || again.End != nil || again.Pid == running.Pid {
		s.T.Errorf("started again, it is %v (%v)", again, err)
	}
	states := s.await("host1", g.Name, inState("running"))
	if len(states) != 1 {
		s.T.Errorf("a watch begins with %q", states)
	}
}

// notThere asks for a guest that nobody has.
func (s *suite) notThere() {
	c, name := s.Clients["host1"].Guests, &lmctlv1.GuestRequest{Name: "nobody"}
	_, err := c.Show(s.Context(), name)
	s.refused("show", err, codes.NotFound)
	_, err = c.Start(s.Context(), name)
	s.refused("start", err, codes.NotFound)
	_, err = c.Destroy(s.Context(), name)
	s.refused("destroy", err, codes.NotFound)
	_, err = c.Undefine(s.Context(), name)
	s.refused("undefine", err, codes.NotFound)
	_, err = s.Clients["host1"].Migrations.Start(s.Context(), &lmctlv1.StartMigrationRequest{Guest: "nobody", Destination: "host2"})
	s.refused("migrate", err, codes.NotFound)
}

// killed kills a guest's QEMU.
func (s *suite) killed() {
	g := s.start()
	pid := int(s.on("host1", g.Name).Pid)
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		s.T.Fatal(err)
	}
	defer unix.Close(fd)
	if now := s.on("host1", g.Name); int(now.Pid) != pid { // the process is still the guest's
		s.T.Fatalf("it has process %d now", now.Pid)
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		s.T.Fatal(err)
	}
	s.await("host1", g.Name, inState("stopped"))
	end := s.on("host1", g.Name).End
	if end.GetCause() != "killed" || end.GetSignal() != int32(unix.SIGKILL) {
		s.T.Errorf("it has ended: %v", end)
	}
}

// adopted has an agent stop and another find its guests.
func (s *suite) adopted() {
	g := s.start()
	before := s.on("host1", g.Name)
	if err := s.Lab.StopAgent(s.Context(), "host1"); err != nil {
		s.T.Fatal(err)
	}
	if err := s.Lab.StartAgent(s.Context(), "host1"); err != nil {
		s.T.Fatal(err)
	}
	s.await("host1", g.Name, inState("running"))
	if after := s.on("host1", g.Name); after.Pid != before.Pid || after.Ownership.GetEpoch() != before.Ownership.GetEpoch() || after.Ownership.GetState() != "owned" {
		s.T.Errorf("it was %v and is %v", before, after)
	}
	s.healthy(g, "host1")
}

// move moves a guest there and back.
func (s *suite) move() {
	g := s.start()
	epoch := s.on("host1", g.Name).Ownership.GetEpoch()
	r := s.report("host1", s.begin(g, &lmctlv1.MigrationOptions{Verify: true}))
	s.moved(g, r, "host1", "host2")
	m, err := s.Clients["host2"].Migrations.Start(s.Context(), &lmctlv1.StartMigrationRequest{Guest: g.Name, Destination: "host1", Options: &lmctlv1.MigrationOptions{Verify: true}})
	if err != nil {
		s.T.Fatal(err)
	}
	s.moved(g, s.report("host2", m.Id), "host2", "host1")
	if now := s.on("host1", g.Name).Ownership.GetEpoch(); now != epoch+2 {
		s.T.Errorf("epoch %d after two moves from epoch %d", now, epoch)
	}
}

// moved checks the account of a move and what the agents say after it.
func (s *suite) moved(g lab.Guest, r *migrate.Report, from, to string) {
	s.T.Helper()
	if r.Result != migrate.Completed || r.Error != "" || r.Mode != migrate.Direct || r.Source != from || r.Destination != to || r.Guest != g.Name {
		s.T.Fatalf("report %+v", r)
	}
	if len(r.Passes) < 1 || len(r.Passes) > 8 || r.SwitchoverReason == "" || r.RAMBytes != g.Memory || r.VerifiedPages*migrate.PageSize != g.Memory {
		s.T.Errorf("passes and memory: %+v", r)
	}
	p := r.DowntimeParts
	if r.Downtime <= 0 || r.Total <= r.Downtime || p.StateSave <= 0 || p.StateLoad <= 0 || p.StateBytes <= 0 || p.Commit <= 0 || p.Resume <= 0 || p.Verify <= 0 {
		s.T.Errorf("times: %+v", r)
	}
	s.await(to, g.Name, inState("running"))
	s.healthy(g, to)
	here := s.on(to, g.Name)
	if here.State != "running" || here.Ownership.GetState() != "owned" || here.Migration != "" || here.Uuid != g.UUID {
		s.T.Errorf("on %s it is %v", to, here)
	}
	if there := s.on(from, g.Name); there != nil {
		s.T.Errorf("on %s there is %v", from, there)
	}
}

// cancel calls a migration off that another one must not overtake.
func (s *suite) cancel() {
	g := s.start()
	id := s.begin(g, &lmctlv1.MigrationOptions{Bandwidth: proto.Int64(256 << 10)})
	m, err := s.Follow("host1", id, func(m *lmctlv1.Migration) bool { return m.State == string(migrate.SourceCopying) })
	if err != nil {
		s.T.Fatal(err)
	}
	if m.Finished {
		s.T.Fatalf("it ended before it was cancelled: %s %s", m.Result, m.Error)
	}
	_, err = s.Clients["host1"].Migrations.Start(s.Context(), &lmctlv1.StartMigrationRequest{Guest: g.Name, Destination: "host2"})
	if e := s.refused("migrate it twice", err, codes.FailedPrecondition); e.Result != string(migrate.Refused) || !strings.Contains(e.Cause, id) {
		s.T.Errorf("refused: %+v", e)
	}
	_, err = s.Clients["host1"].Guests.Destroy(s.Context(), &lmctlv1.GuestRequest{Name: g.Name})
	s.refused("destroy it meanwhile", err, codes.FailedPrecondition)
	if _, err := s.Clients["host1"].Migrations.Cancel(s.Context(), &lmctlv1.MigrationRequest{Id: id}); err != nil {
		s.T.Fatal(err)
	}
	if r := s.report("host1", id); r.Result != migrate.Cancelled || r.Error == "" {
		s.T.Errorf("report %+v", r)
	}
	s.healthy(g, "host1")
	if here := s.on("host1", g.Name); here.State != "running" || here.Ownership.GetState() != "owned" || here.Migration != "" {
		s.T.Errorf("it is %v", here)
	}
	s.gone("host2", g.Name)
}

// gone waits until a host has nothing of a guest.
func (s *suite) gone(host, name string) {
	s.T.Helper()
	if s.on(host, name) != nil {
		s.await(host, name, func(e *lmctlv1.GuestEvent) bool { return e.Removed })
	}
}

// refusals asks for moves that cannot be.
func (s *suite) refusals() {
	g := s.start()
	migrations := s.Clients["host1"].Migrations
	for what, destination := range map[string]string{"to itself": "host1", "to nobody": "host9"} {
		_, err := migrations.Start(s.Context(), &lmctlv1.StartMigrationRequest{Guest: g.Name, Destination: destination})
		if e := s.refused(what, err, codes.FailedPrecondition); e.Result != string(migrate.Refused) || len(e.Reasons) == 0 {
			s.T.Errorf("%s: %+v", what, e)
		}
	}
	for what, options := range map[string]*lmctlv1.MigrationOptions{
		"no passes":        {MaxPasses: proto.Int32(0)},
		"too many streams": {Streams: proto.Int32(17)},
		"no such mode":     {Mode: "post-copy"},
	} {
		_, err := migrations.Start(s.Context(), &lmctlv1.StartMigrationRequest{Guest: g.Name, Destination: "host2", Options: options})
		s.refused(what, err, codes.InvalidArgument)
	}
	if _, err := s.Clients["host1"].Guests.Destroy(s.Context(), &lmctlv1.GuestRequest{Name: g.Name}); err != nil {
		s.T.Fatal(err)
	}
	_, err := migrations.Start(s.Context(), &lmctlv1.StartMigrationRequest{Guest: g.Name, Destination: "host2"})
	if e := s.refused("a stopped guest", err, codes.FailedPrecondition); e.Result != string(migrate.Refused) {
		s.T.Errorf("a stopped guest: %+v", e)
	}
}

// dryRun asks what a migration would meet.
func (s *suite) dryRun() {
	g := s.start()
	ask := func(destination string) *lmctlv1.MigrationVerdict {
		s.T.Helper()
		v, err := s.Clients["host1"].Migrations.Check(s.Context(), &lmctlv1.StartMigrationRequest{Guest: g.Name, Destination: destination})
		if err != nil {
			s.T.Fatal(err)
		}
		return v
	}
	v := ask("host2")
	if !v.Ok || v.Mode != string(migrate.Direct) || len(v.Source) == 0 || len(v.Destination) == 0 {
		s.T.Errorf("to host2: %v", v)
	}
	if v = ask("host9"); v.Ok || !slices.ContainsFunc(slices.Concat(v.Source, v.Destination), func(l *lmctlv1.CheckLine) bool {
		return l.Verdict == lmctlv1.CheckLine_VERDICT_FAIL && l.Advice+l.Detail != ""
	}) {
		s.T.Errorf("to nobody: %v", v)
	}
	s.healthy(g, "host1")
	if there := s.on("host2", g.Name); there != nil {
		s.T.Errorf("a dry run left %v", there)
	}
}
