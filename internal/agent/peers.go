package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"

	"google.golang.org/grpc/codes"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/ledger"
	"github.com/lmctl/lmctl/internal/pki"
	"github.com/lmctl/lmctl/migrate"
)

// peers are the agents of the other hosts.
type peers struct {
	a *Agent

	mu      sync.Mutex
	clients map[string]*api.Client
}

func newPeers(a *Agent) *peers { return &peers{a: a, clients: make(map[string]*api.Client)} }

// address is where a host's agent listens.
func (p *peers) address(host string) (string, error) {
	if addr, ok := p.a.cfg.Peers[host]; ok {
		return addr, nil
	}
	return "", fmt.Errorf("agent: host %q is not known here: add it to peers in the agent's configuration", host)
}

// client is a connection to a host's agent, made when it is first used.
func (p *peers) client(host string) (*api.Client, error) {
	addr, err := p.address(host)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.clients[host]; c != nil {
		return c, nil
	}
	c, err := api.Dial(api.Target{Address: addr, Identity: p.a.identity, Host: host})
	if err != nil {
		return nil, err
	}
	p.clients[host] = c
	return c, nil
}

func (p *peers) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, c := range p.clients {
		errs = append(errs, c.Close())
	}
	clear(p.clients)
	return errors.Join(errs...)
}

// dialMigrate opens a connection of the data plane to a host.
func (p *peers) dialMigrate(ctx context.Context, host string) (net.Conn, error) {
	addr, err := p.address(host)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, p.a.cfg.PeerTimeout)
	defer cancel()
	d := tls.Dialer{Config: p.a.identity.ClientConfig(pki.ALPNMigrate, pki.Expect{Host: host})}
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("agent: reach host %s at %s: %w", host, addr, err)
	}
	return conn, nil
}

// settle tells a host what this one knows of a guest and hears what it knows.
func (p *peers) settle(ctx context.Context, host string, s ledger.Statement) (*ledger.Statement, error) {
	c, err := p.client(host)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, p.a.cfg.PeerTimeout)
	defer cancel()
	answer, err := c.Peer.Settle(ctx, statementToWire(s))
	if err != nil {
		return nil, err
	}
	heard := statementFromWire(answer)
	if heard.Host != host || heard.Guest != s.Guest {
		return nil, fmt.Errorf("agent: host %s answered for guest %q of host %q", host, heard.Guest, heard.Host)
	}
	if err := checkEpoch(heard); err != nil {
		return nil, err
	}
	return &heard, nil
}

// peerService is what other agents may ask.
type peerService struct {
	lmctlv1.UnimplementedPeerServer
	a *Agent
}

// Settle implements lmctlv1.PeerServer.
func (s *peerService) Settle(ctx context.Context, in *lmctlv1.Statement) (*lmctlv1.Statement, error) {
	who, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	heard := statementFromWire(in)
	if heard.Host != who.name {
		return nil, &api.Error{Code: codes.PermissionDenied, Operation: "settle guest", Object: heard.Guest,
			Cause: fmt.Sprintf("host %s speaks for host %q", who.name, heard.Host)}
	}
	if err := ledger.CheckGuest(heard.Guest); err != nil {
		return nil, &api.Error{Code: codes.InvalidArgument, Operation: "settle guest", Cause: err.Error()}
	}
	if err := checkEpoch(heard); err != nil {
		return nil, &api.Error{Code: codes.InvalidArgument, Operation: "settle guest", Object: heard.Guest, Cause: err.Error()}
	}
	free := s.hear(ctx, heard)
	answer := s.a.settler.say(heard.Guest)
	answer.Busy = answer.Busy || !free
	return statementToWire(answer), nil
}

// maxEpoch is far beyond what any guest's owners can count up to, and leaves
// room to count on.
const maxEpoch = 1 << 62

func checkEpoch(s ledger.Statement) error {
	if s.Epoch > maxEpoch || s.Handover != nil && s.Handover.Epoch > maxEpoch {
		return fmt.Errorf("agent: host %s says that guest %s has epoch %d, which cannot be", s.Host, s.Guest, s.Epoch)
	}
	return nil
}

// hear acts on what another host says of its own accord. It may be late: said
// before the handover that this host's record is about had begun. Only what
// stays true is acted upon; the rest is a reason to ask. It says whether this
// host was free to act: what is under way about the guest is not waited for.
func (s *peerService) hear(ctx context.Context, heard ledger.Statement) (free bool) {
	switch s.a.ledger.Get(heard.Guest).State {
	case ledger.None, ledger.Gone:
		// Only answered for: a shell may just be in the making.
		return true
	case ledger.Prepared, ledger.Withdrawn:
		if heard.State != ledger.HandedOver {
			s.a.settler.kick(heard.Guest)
			return true
		}
	case ledger.Owned, ledger.Moving, ledger.Contested:
		// Only a host that this one's operator has named may outrank it.
		if _, err := s.a.peers.address(heard.Host); err != nil {
			return true
		}
	}
	if s.a.settler.trySettle(ctx, heard.Guest, &heard) {
		return true
	}
	s.a.settler.kick(heard.Guest)
	return false
}

// HostFacts implements lmctlv1.PeerServer.
func (s *peerService) HostFacts(ctx context.Context, _ *lmctlv1.HostFactsRequest) (*lmctlv1.Host, error) {
	return s.a.hostFacts(ctx), nil
}

func statementToWire(s ledger.Statement) *lmctlv1.Statement {
	return &lmctlv1.Statement{Host: s.Host, Guest: s.Guest, Uuid: s.UUID, State: string(s.State),
		Epoch: s.Epoch, Handover: handoverToWire(s.Handover), Busy: s.Busy}
}

func statementFromWire(s *lmctlv1.Statement) ledger.Statement {
	return ledger.Statement{Host: s.GetHost(), Guest: s.GetGuest(), UUID: s.GetUuid(), State: ledger.State(s.GetState()),
		Epoch: s.GetEpoch(), Handover: handoverFromWire(s.GetHandover()), Busy: s.GetBusy()}
}

func handoverToWire(h *migrate.Handover) *lmctlv1.Handover {
	if h == nil {
		return nil
	}
	return &lmctlv1.Handover{Id: h.ID, Guest: h.Guest, Uuid: h.UUID, Source: h.Source, Destination: h.Destination, Epoch: h.Epoch}
}

func handoverFromWire(h *lmctlv1.Handover) *migrate.Handover {
	if h == nil {
		return nil
	}
	return &migrate.Handover{ID: h.GetId(), Guest: h.GetGuest(), UUID: h.GetUuid(), Source: h.GetSource(), Destination: h.GetDestination(), Epoch: h.GetEpoch()}
}
