package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/ledger"
	"github.com/lmctl/lmctl/internal/pki"
	"github.com/lmctl/lmctl/migrate"
)

// codeIs says whether an error of a call has a code.
func codeIs(t *testing.T, err error, want ...codes.Code) *api.Error {
	t.Helper()
	var e *api.Error
	if !errors.As(err, &e) || !slices.Contains(want, e.Code) {
		t.Fatalf("%v, want %v", err, want)
	}
	return e
}

func TestWhoMayDoWhat(t *testing.T) {
	s := newSite(t, "alpha", "beta")
	local := s.serve(s.agent(s.config("alpha"), newFake()))
	ctx := t.Context()
	guests := func(c *api.Client) error {
		_, err := c.Guests.List(ctx, &lmctlv1.ListGuestsRequest{})
		return err
	}
	stream := func(c *api.Client) error {
		w, err := c.Migrations.Watch(ctx, &lmctlv1.MigrationRequest{Id: "none"})
		if err != nil {
			return err
		}
		_, err = w.Recv()
		return err
	}
	facts := func(c *api.Client) error {
		_, err := c.Peer.HostFacts(ctx, &lmctlv1.HostFactsRequest{})
		return err
	}
	remote := func(role pki.Role, name string) *api.Client {
		return s.client(api.Target{Address: s.peers["alpha"], Host: "alpha", Identity: s.identity(role, name)})
	}
	operator, host := remote(pki.Operator, "ann"), remote(pki.Host, "beta")
	for _, tc := range []struct {
		name string
		call func(*api.Client) error
		c    *api.Client
		want codes.Code
	}{
		{"root, guests", guests, local, codes.OK},
		{"root, peer", facts, local, codes.PermissionDenied},
		{"operator, guests", guests, operator, codes.OK},
		{"operator, a stream", stream, operator, codes.NotFound},
		{"operator, peer", facts, operator, codes.PermissionDenied},
		{"host, peer", facts, host, codes.OK},
		{"host, guests", guests, host, codes.PermissionDenied},
		{"host, a stream", stream, host, codes.PermissionDenied},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.call(tc.c)
			if tc.want == codes.OK {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			codeIs(t, err, tc.want)
		})
	}
	stranger := newSite(t)
	id := stranger.identity(pki.Operator, "eve")
	codeIs(t, guests(s.client(api.Target{Address: s.peers["alpha"], Host: "alpha", Identity: id})), codes.Unavailable)
}

// dialTLS opens a connection to a host with any configuration.
func dialTLS(t *testing.T, addr string, cfg *tls.Config) *tls.Conn {
	t.Helper()
	conn, err := tls.Dial("tcp", addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeQuietly(conn) })
	return conn
}

// closed says whether the other side ends a connection without a word.
func closed(conn net.Conn) bool {
	n, err := conn.Read(make([]byte, 1))
	return n == 0 && err != nil
}

func TestPortTellsProtocolsApart(t *testing.T) {
	s := newSite(t, "alpha", "beta")
	s.serve(s.agent(s.config("alpha"), newFake()))
	addr, want := s.peers["alpha"], pki.Expect{Host: "alpha"}

	operator := dialTLS(t, addr, s.identity(pki.Operator, "ann").ClientConfig(pki.ALPNMigrate, want))
	if !closed(operator) {
		t.Error("an operator may use the data plane")
	}
	host := dialTLS(t, addr, s.identity(pki.Host, "beta").ClientConfig(pki.ALPNMigrate, want))
	if _, err := host.Write([]byte("GET / HTTP/1.1\r\n\r\nand so on, for longer than a preamble can be\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if !closed(host) {
		t.Error("the data plane answers rubbish")
	}
	none := s.identity(pki.Host, "beta").ClientConfig(pki.ALPNAPI, want)
	none.NextProtos, none.VerifyConnection = nil, nil
	if !closed(dialTLS(t, addr, none)) {
		t.Error("a connection without a protocol is served")
	}
}

// TestStrangersCostLittle: those who do not shake hands do not keep others out
// for longer than their time.
func TestStrangersCostLittle(t *testing.T) {
	s := newSite(t, "alpha", "beta")
	cfg := s.config("alpha")
	cfg.Limits.Handshakes, cfg.Limits.HandshakeTimeout = 2, 50*time.Millisecond
	s.serve(s.agent(cfg, newFake()))
	var idle []net.Conn
	for range 6 {
		conn, err := net.Dial("tcp", s.peers["alpha"])
		if err != nil {
			t.Fatal(err)
		}
		idle = append(idle, conn)
	}
	c := s.client(api.Target{Address: s.peers["alpha"], Host: "alpha", Identity: s.identity(pki.Host, "beta")})
	if _, err := c.Peer.HostFacts(t.Context(), &lmctlv1.HostFactsRequest{}); err != nil {
		t.Errorf("a host is kept out: %v", err)
	}
	for _, conn := range idle {
		if !closed(conn) {
			t.Error("a stranger got an answer")
		}
		closeQuietly(conn)
	}
}

func TestOneAgentForAStateFolder(t *testing.T) {
	s := newSite(t, "alpha")
	cfg := s.config("alpha")
	s.agent(cfg, newFake())
	_, err := newAgent(t.Context(), cfg, "test", slog.New(slog.DiscardHandler), func(*Agent) (hypervisor.Driver, error) { return newFake(), nil })
	if err == nil || !strings.Contains(err.Error(), "another agent has the state folder") {
		t.Fatalf("a second agent: %v", err)
	}
}

func TestCertificateMustBeThisHosts(t *testing.T) {
	s := newSite(t, "alpha", "beta")
	cfg := s.config("alpha")
	cfg.Name = "gamma"
	_, err := newAgent(t.Context(), cfg, "test", slog.New(slog.DiscardHandler), func(*Agent) (hypervisor.Driver, error) { return newFake(), nil })
	if err == nil || !strings.Contains(err.Error(), "is for host alpha, but this is host gamma") {
		t.Fatalf("agent with another host's certificate: %v", err)
	}
}

const definition = "name: g\nuuid: 6f7c1c0e-8a53-4a0e-9d5c-0d5a4ad2a001\nmemory: 64MiB\n"

func TestGuestNeedsOwnership(t *testing.T) {
	s := newSite(t, "alpha", "beta")
	d := newFake()
	a := s.agent(s.config("alpha"), d)
	c := s.serve(a)
	ctx := t.Context()
	name := &lmctlv1.GuestRequest{Name: "g"}
	_, err := c.Guests.Start(ctx, name)
	codeIs(t, err, codes.NotFound)
	_, err = c.Guests.Define(ctx, &lmctlv1.DefineRequest{Definition: []byte("name: g\nmemori: 1\n")})
	codeIs(t, err, codes.InvalidArgument)
	g, err := c.Guests.Define(ctx, &lmctlv1.DefineRequest{Definition: []byte(definition)})
	if err != nil || g.GetOwnership().GetState() != "owned" || g.GetOwnership().GetEpoch() != 1 {
		t.Fatalf("define: %v %v", g, err)
	}
	if g, err = c.Guests.Start(ctx, name); err != nil || g.GetState() != "running" {
		t.Fatalf("start: %v %v", g, err)
	}
	_, err = c.Guests.Stop(ctx, &lmctlv1.StopRequest{Name: "g"})
	if e := codeIs(t, err, codes.DeadlineExceeded); e.Operation != "stop guest" || e.Object != "g" {
		t.Errorf("error: %+v", e)
	}
	if _, err = c.Guests.Destroy(ctx, name); err != nil {
		t.Fatal(err)
	}
	h := migrate.Handover{ID: "h", Guest: "g", UUID: g.GetUuid(), Source: "alpha", Destination: "beta", Epoch: 2}
	if err := errors.Join(a.ledger.Begin(ctx, h), a.ledger.HandOver(ctx, h)); err != nil {
		t.Fatal(err)
	}
	a.settler.settle(ctx, "g", nil)
	_, err = c.Guests.Start(ctx, name)
	if e := codeIs(t, err, codes.FailedPrecondition); e.Result != "in-doubt" || !strings.Contains(e.Cause, "guest claim") {
		t.Errorf("error: %+v", e)
	}
	if g, err = c.Guests.Show(ctx, name); err != nil || g.GetState() != "in-doubt" || g.GetAdvice() == "" {
		t.Errorf("show: %v %v", g, err)
	}
	_, err = c.Guests.Claim(ctx, &lmctlv1.ClaimRequest{Name: "g"})
	if e := codeIs(t, err, codes.FailedPrecondition); !strings.Contains(e.Cause, "--force") {
		t.Errorf("claim without force: %+v", e)
	}
	if g, err = c.Guests.Claim(ctx, &lmctlv1.ClaimRequest{Name: "g", Force: true}); err != nil || g.GetOwnership().GetEpoch() != 3 {
		t.Fatalf("claim: %v %v", g, err)
	}
	if _, err = c.Guests.Start(ctx, name); err != nil {
		t.Errorf("start after a claim: %v", err)
	}
}

func TestMigrationRefusals(t *testing.T) {
	s := newSite(t, "alpha", "beta")
	d := newFake()
	a := s.agent(s.config("alpha"), d)
	c := s.serve(a)
	ctx := t.Context()
	if _, err := c.Guests.Define(ctx, &lmctlv1.DefineRequest{Definition: []byte(definition)}); err != nil {
		t.Fatal(err)
	}
	move := func(guest, host string, opts *lmctlv1.MigrationOptions) (*lmctlv1.Migration, error) {
		return c.Migrations.Start(ctx, &lmctlv1.StartMigrationRequest{Guest: guest, Destination: host, Options: opts})
	}
	for host, want := range map[string]string{"alpha": "already", "nowhere": "not known"} {
		_, err := move("g", host, nil)
		if e := codeIs(t, err, codes.FailedPrecondition); e.Result != string(migrate.Refused) || !strings.Contains(e.Cause, want) {
			t.Errorf("to %s: %+v", host, e)
		}
	}
	_, err := move("ghost", "beta", nil)
	codeIs(t, err, codes.NotFound)
	for _, n := range []int32{0, migrate.MaxStreams + 1} {
		_, err = move("g", "beta", &lmctlv1.MigrationOptions{Streams: &n})
		codeIs(t, err, codes.InvalidArgument)
	}

	m, err := move("g", "beta", nil)
	if err != nil {
		t.Fatal(err)
	}
	watch, err := c.Migrations.Watch(ctx, &lmctlv1.MigrationRequest{Id: m.GetId()})
	if err != nil {
		t.Fatal(err)
	}
	for !m.GetFinished() {
		if m, err = watch.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	if m.GetResult() != string(migrate.Refused) || !strings.Contains(m.GetError(), "cannot move") || !strings.Contains(string(m.GetReport()), `"result":"refused"`) {
		t.Errorf("migration: %v", m)
	}
	list, err := c.Migrations.List(ctx, &lmctlv1.ListMigrationsRequest{Guest: "g"})
	if err != nil || len(list.GetMigrations()) != 1 {
		t.Errorf("list: %v %v", list, err)
	}
	_, err = c.Migrations.Cancel(ctx, &lmctlv1.MigrationRequest{Id: m.GetId()})
	codeIs(t, err, codes.FailedPrecondition)
	again, err := newMoves(a)
	if err != nil || len(again.list()) != 1 || again.list()[0].report.Result != migrate.Refused {
		t.Errorf("the report was not kept: %v", err)
	}
	a.moves.refuse()
	_, err = move("g", "beta", nil)
	codeIs(t, err, codes.Unavailable)
}

// until waits for something that the agents do by themselves.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: it did not happen", what)
		}
	}
}

// TestAgentsSettle brings two agents up with the records that a broken handover
// left, and sees what they make of it.
func TestAgentsSettle(t *testing.T) {
	h := migrate.Handover{ID: "h", Guest: "g", UUID: "uuid-g", Source: "alpha", Destination: "beta", Epoch: 2}
	for _, tc := range []struct {
		name              string
		withdrawn, shell  bool
		alpha, beta       ledger.State
		alphaDid, betaDid string
	}{
		{"the word is found in the source's record", false, true, ledger.Gone, ledger.Owned, "release g", "run g"},
		{"the shell is gone", false, false, ledger.Owned, ledger.None, "resume g", ""},
		{"withdrawn", true, false, ledger.Owned, ledger.None, "resume g", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := t.Context()
			s := newSite(t, "alpha", "beta")
			da, db := newFake(), newFake()
			da.set("g", func(i *hypervisor.Info) { i.State, i.PID, i.Suspended = hypervisor.StateMigrating, 1, true })
			if tc.shell {
				db.set("g", func(i *hypervisor.Info) { i.State, i.PID = hypervisor.StateIncoming, 1 })
			}
			ca, cb := s.config("alpha"), s.config("beta")
			prepareLedger(t, ca, func(l *ledger.Ledger) error {
				return errors.Join(l.Define(ctx, "g", "uuid-g"), l.Begin(ctx, h), l.HandOver(ctx, h))
			})
			prepareLedger(t, cb, func(l *ledger.Ledger) error {
				err := l.Prepare(ctx, h)
				if tc.withdrawn {
					err = errors.Join(err, l.Withdraw(ctx, h))
				}
				return err
			})
			alpha, beta := s.agent(ca, da), s.agent(cb, db)
			if reason, open := alpha.settler.doubt("g"); !open || !strings.Contains(reason, "claim") {
				t.Errorf("before they meet: %q %t", reason, open)
			}
			s.serve(alpha)
			s.serve(beta)
			until(t, "settling", func() bool {
				return alpha.ledger.Get("g").State == tc.alpha && beta.ledger.Get("g").State == tc.beta
			})
			until(t, tc.alphaDid, func() bool { return slices.Contains(da.history(), tc.alphaDid) })
			if tc.betaDid != "" && !slices.Contains(db.history(), tc.betaDid) {
				t.Errorf("beta did %v", db.history())
			}
			if slices.Contains(da.history(), "resume g") && slices.Contains(db.history(), "run g") {
				t.Errorf("both ran it: %v and %v", da.history(), db.history())
			}
		})
	}
}

// prepareLedger writes records as an earlier agent would have left them.
func prepareLedger(t *testing.T, cfg Config, write func(*ledger.Ledger) error) {
	t.Helper()
	boot, err := ledger.BootID()
	if err != nil {
		t.Fatal(err)
	}
	l, err := ledger.Open(cfg.StateDir+"/ledger", cfg.Name, boot, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(write(l), l.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestSettleSpeaksForItself: a host cannot make a statement in another's name.
func TestSettleSpeaksForItself(t *testing.T) {
	s := newSite(t, "alpha", "beta", "gamma")
	s.serve(s.agent(s.config("alpha"), newFake()))
	c := s.client(api.Target{Address: s.peers["alpha"], Host: "alpha", Identity: s.identity(pki.Host, "gamma")})
	_, err := c.Peer.Settle(t.Context(), &lmctlv1.Statement{Host: "beta", Guest: "g", State: "owned", Epoch: 99})
	codeIs(t, err, codes.PermissionDenied)
	_, err = c.Peer.Settle(t.Context(), &lmctlv1.Statement{Host: "gamma", Guest: "../g"})
	codeIs(t, err, codes.InvalidArgument)
	answer, err := c.Peer.Settle(t.Context(), &lmctlv1.Statement{Host: "gamma", Guest: "g", State: "owned", Epoch: 99})
	if err != nil || answer.GetState() != "" || answer.GetHost() != "alpha" {
		t.Errorf("%v %v", answer, err)
	}
}

// TestOutrankedCopyIsKept: a guest that runs here although another host owns it
// by a higher right is stopped, and not thrown away.
func TestOutrankedCopyIsKept(t *testing.T) {
	ctx := t.Context()
	s := newSite(t, "alpha", "beta")
	d := newFake()
	d.set("g", func(i *hypervisor.Info) { i.State, i.PID = hypervisor.StateRunning, 1 })
	cfg := s.config("alpha")
	prepareLedger(t, cfg, func(l *ledger.Ledger) error { return l.Define(ctx, "g", "uuid-g") })
	a := s.agent(cfg, d)
	s.serve(a)
	c := s.client(api.Target{Address: s.peers["alpha"], Host: "alpha", Identity: s.identity(pki.Host, "beta")})
	answer, err := c.Peer.Settle(ctx, &lmctlv1.Statement{Host: "beta", Guest: "g", Uuid: "uuid-g", State: "owned", Epoch: 5})
	if err != nil || answer.GetState() != string(ledger.Contested) {
		t.Fatalf("%v %v", answer, err)
	}
	if got := d.history(); !slices.Equal(got, []string{"suspend g"}) {
		t.Errorf("did %v", got)
	}
}
