package agent

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/qemu"
	"github.com/lmctl/lmctl/internal/ledger"
	"github.com/lmctl/lmctl/internal/pki"
	"github.com/lmctl/lmctl/migrate"
)

// TestUnreachableCopyIsWaitedFor: nothing is done about a copy that may run or
// not, and it is looked at again when it can be reached.
func TestUnreachableCopyIsWaitedFor(t *testing.T) {
	ctx := t.Context()
	s := newSite(t, "alpha", "beta")
	d := newFake()
	d.seen = make(chan hypervisor.Info)
	d.set("g", func(i *hypervisor.Info) { i.State, i.PID = hypervisor.StateUnreachable, 1 })
	d.set("lost", func(i *hypervisor.Info) { i.State = hypervisor.StateUnreachable })
	cfg := s.config("alpha")
	prepareLedger(t, cfg, func(l *ledger.Ledger) error {
		h := migrate.Handover{ID: "h", Guest: "g", UUID: "uuid-g", Source: "alpha", Destination: "beta", Epoch: 2}
		o := migrate.Handover{ID: "o", Guest: "lost", UUID: "uuid-lost", Source: "beta", Destination: "alpha", Epoch: 2}
		return errors.Join(l.Define(ctx, "g", "uuid-g"), l.Begin(ctx, h), l.Prepare(ctx, o), l.Accept(ctx, o))
	})
	a := s.agent(cfg, d)
	c := s.serve(a)
	_, err := c.Guests.Claim(ctx, &lmctlv1.ClaimRequest{Name: "lost", Force: true})
	codeIs(t, err, codes.FailedPrecondition)
	if did := d.history(); len(did) != 0 || a.ledger.Get("g").State != ledger.Moving || a.ledger.Get("lost").State != ledger.Accepted {
		t.Fatalf("did %v, records %+v and %+v", did, a.ledger.Get("g"), a.ledger.Get("lost"))
	}
	d.seen <- hypervisor.Info{Name: "g", State: hypervisor.StateUnreachable}
	d.set("g", func(i *hypervisor.Info) { i.State, i.Suspended = hypervisor.StateMigrating, true })
	d.seen <- hypervisor.Info{Name: "g", State: hypervisor.StateMigrating}
	until(t, "resume", func() bool { return a.ledger.Get("g").State == ledger.Owned })
	if did := d.history(); !slices.Equal(did, []string{"resume g"}) {
		t.Errorf("did %v", did)
	}
}

// rebooted writes the record of a guest that was accepted, or only prepared,
// before the host restarted, and says its handover.
func rebooted(t *testing.T, cfg Config, accepted bool) migrate.Handover {
	t.Helper()
	def, err := qemu.ParseDefinition([]byte(definition))
	if err != nil {
		t.Fatal(err)
	}
	h := migrate.Handover{ID: "h", Guest: "g", UUID: def.UUID, Source: "beta", Destination: "alpha", Epoch: 2}
	l, err := ledger.Open(filepath.Join(cfg.StateDir, "ledger"), cfg.Name, "before", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	err = l.Prepare(t.Context(), h)
	if accepted {
		err = errors.Join(err, l.Accept(t.Context(), h))
	}
	if err := errors.Join(err, l.Close()); err != nil {
		t.Fatal(err)
	}
	text, err := def.YAML()
	if err != nil {
		t.Fatal(err)
	}
	kept, err := openDefinitions(filepath.Join(cfg.StateDir, "incoming"))
	if err != nil {
		t.Fatal(err)
	}
	if err := kept.keep("g", text); err != nil {
		t.Fatal(err)
	}
	return h
}

// TestWaysOut: what an operator is told to do about a guest whose shell was lost
// with a restart, and whose source does not answer, can be done.
func TestWaysOut(t *testing.T) {
	ctx := t.Context()
	t.Run("claim", func(t *testing.T) {
		s := newSite(t, "alpha", "beta")
		cfg := s.config("alpha")
		h := rebooted(t, cfg, false)
		c := s.serve(s.agent(cfg, newFake()))
		g, err := c.Guests.Claim(ctx, &lmctlv1.ClaimRequest{Name: "g", Force: true})
		if err != nil || g.GetUuid() != h.UUID || g.GetOwnership().GetState() != "owned" || len(g.GetDefinition()) == 0 {
			t.Fatalf("%v %v", g, err)
		}
		if _, err := c.Guests.Start(ctx, &lmctlv1.GuestRequest{Name: "g"}); err != nil {
			t.Error(err)
		}
	})
	t.Run("destroy", func(t *testing.T) {
		s := newSite(t, "alpha", "beta")
		cfg := s.config("alpha")
		rebooted(t, cfg, false)
		a := s.agent(cfg, newFake())
		c := s.serve(a)
		if _, err := c.Guests.Destroy(ctx, &lmctlv1.GuestRequest{Name: "g"}); err != nil {
			t.Fatal(err)
		}
		if r := a.ledger.Get("g"); r.State != ledger.None {
			t.Errorf("record: %+v", r)
		}
		_, err := c.Guests.Show(ctx, &lmctlv1.GuestRequest{Name: "g"})
		codeIs(t, err, codes.NotFound)
	})
}

// arrived is rebooted with a guest that this host owns.
func arrived(t *testing.T, cfg Config) migrate.Handover {
	t.Helper()
	h := rebooted(t, cfg, true)
	l, err := ledger.Open(filepath.Join(cfg.StateDir, "ledger"), cfg.Name, "before", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(l.Own(t.Context(), h), l.Close()); err != nil {
		t.Fatal(err)
	}
	return h
}

// TestDefinitionKeptUntilArrived: the definition of a guest that came here is kept
// as long as its hypervisor has none of it, and no longer: one that another hand
// removes while there is no agent is not brought back.
func TestDefinitionKeptUntilArrived(t *testing.T) {
	s := newSite(t, "alpha", "beta")
	cfg := s.config("alpha")
	h := arrived(t, cfg)
	d := newFake()
	d.seen = make(chan hypervisor.Info)
	d.set("g", func(i *hypervisor.Info) {
		i.UUID, i.State, i.PID, i.Arriving = h.UUID, hypervisor.StateRunning, 1, true
	})
	a := s.agent(cfg, d)
	s.serve(a)
	kept := func() bool {
		_, kept := a.kept.get("g")
		return kept
	}
	seen := func() {
		t.Helper()
		info, err := d.Get("g")
		if err != nil {
			t.Fatal(err)
		}
		for range 3 { // when the third is taken, the first has been acted on
			select {
			case d.seen <- info:
			case <-time.After(time.Minute):
				t.Fatal("nobody watches")
			}
		}
	}
	if seen(); !kept() {
		t.Error("its definition was forgotten while its hypervisor had none")
	}
	d.set("g", func(i *hypervisor.Info) { i.Arriving = false })
	if seen(); kept() {
		t.Error("its definition is kept though it is a guest like any other")
	}
}

// TestDefinitionWaitsForHypervisor: an agent that comes back before its hypervisor
// defines a guest of its own again, which was lost with its shell, once that can be
// asked, and then forgets the definition.
func TestDefinitionWaitsForHypervisor(t *testing.T) {
	s := newSite(t, "alpha", "beta")
	cfg := s.config("alpha")
	h := arrived(t, cfg)
	d := newFake()
	d.met = make(chan struct{})
	a := s.agent(cfg, d)
	if _, err := d.Get("g"); err == nil {
		t.Fatal("defined in a hypervisor that cannot be asked")
	}
	if _, kept := a.kept.get("g"); !kept {
		t.Fatal("its definition was forgotten before it was defined")
	}
	close(d.met)
	until(t, "it is defined again", func() bool {
		info, err := d.Get("g")
		_, kept := a.kept.get("g")
		return err == nil && info.UUID == h.UUID && !kept
	})
}

// TestCrashedGuestNeedsItsDefinition: a host does not take over a guest that it
// could not start, or the source would remove the only definition there is.
func TestCrashedGuestNeedsItsDefinition(t *testing.T) {
	ctx := t.Context()
	s := newSite(t, "alpha", "beta")
	cfg := s.config("alpha")
	h := rebooted(t, cfg, true)
	if err := os.Remove(filepath.Join(cfg.StateDir, "incoming", "g.yaml")); err != nil {
		t.Fatal(err)
	}
	a := s.agent(cfg, newFake())
	heard := ledger.Statement{Host: "beta", Guest: "g", UUID: h.UUID, State: ledger.HandedOver, Epoch: h.Epoch, Handover: &h}
	if d := a.settler.settle(ctx, "g", &heard); d.Action != ledger.Wait || a.ledger.Owns("g") == nil {
		t.Errorf("without a definition: %+v, %+v", d, a.ledger.Get("g"))
	}
	if _, err := (&guestService{a: a}).Define(ctx, &lmctlv1.DefineRequest{Definition: []byte(definition)}); err != nil {
		t.Fatal(err)
	}
	if d := a.settler.settle(ctx, "g", &heard); d.Action != ledger.Rest || a.ledger.Owns("g") != nil {
		t.Errorf("with a definition: %+v, %+v", d, a.ledger.Get("g"))
	}
}

// TestOnlyPeersOutrank: a host that is not among the peers takes nothing away,
// nobody can have an epoch that leaves none above it, and whoever asks while
// something is done about the guest is not kept waiting.
func TestOnlyPeersOutrank(t *testing.T) {
	ctx := t.Context()
	s := newSite(t, "alpha", "beta", "gamma")
	d := newFake()
	d.set("g", func(i *hypervisor.Info) { i.State, i.PID = hypervisor.StateRunning, 1 })
	cfg := s.config("alpha")
	delete(cfg.Peers, "gamma")
	prepareLedger(t, cfg, func(l *ledger.Ledger) error { return l.Define(ctx, "g", "uuid-g") })
	a := s.agent(cfg, d)
	s.serve(a)
	target := func(host string) *api.Client {
		return s.client(api.Target{Address: s.peers["alpha"], Host: "alpha", Identity: s.identity(pki.Host, host)})
	}
	say := &lmctlv1.Statement{Host: "gamma", Guest: "g", Uuid: "uuid-g", State: "owned", Epoch: 5}
	if answer, err := target("gamma").Peer.Settle(ctx, say); err != nil || answer.GetState() != "owned" {
		t.Errorf("a stranger outranks: %v %v", answer, err)
	}
	beta := target("beta")
	say.Host, say.Epoch = "beta", 1<<62+1
	_, err := beta.Peer.Settle(ctx, say)
	codeIs(t, err, codes.InvalidArgument)
	if did := d.history(); len(did) != 0 {
		t.Errorf("did %v", did)
	}
	g := a.settler.guest("g")
	g.act.Lock()
	say.Epoch = 5
	answer, err := beta.Peer.Settle(ctx, say)
	g.act.Unlock()
	if err != nil || !answer.GetBusy() || answer.GetState() != "owned" {
		t.Errorf("while something is under way: %v %v", answer, err)
	}
}

// failingListener cannot accept for a while.
type failingListener struct {
	net.Listener
	failures []error
}

func (l *failingListener) Accept() (net.Conn, error) {
	if len(l.failures) > 0 {
		err := l.failures[0]
		l.failures = l.failures[1:]
		return nil, &net.OpError{Op: "accept", Err: err}
	}
	return l.Listener.Accept()
}

// TestPortSurvivesErrors: a host that runs out of descriptors for a moment can
// be reached afterwards.
func TestPortSurvivesErrors(t *testing.T) {
	s := newSite(t, "alpha")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.config("alpha")
	id := s.identity(pki.Host, "alpha")
	m := newMux(&failingListener{ln, []error{syscall.EMFILE, syscall.ENFILE, syscall.ECONNABORTED, syscall.ENOBUFS}}, id, cfg.Limits, slog.New(slog.DiscardHandler))
	done := make(chan error, 1)
	go func() { done <- m.run(t.Context()) }()
	conn := dialTLS(t, ln.Addr().String(), id.ClientConfig(pki.ALPNAPI, pki.Expect{Host: "alpha"}))
	accepted, err := m.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(accepted.Close(), conn.Close(), m.close(), <-done); err != nil {
		t.Error(err)
	}
}
