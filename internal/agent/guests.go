package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/ledger"
)

// defaultStop is how long a guest may take to power down unless told otherwise.
const defaultStop = time.Minute

// stateInDoubt is a guest's state when two hosts have not settled whose it is.
const stateInDoubt = "in-doubt"

// guestService is what operators may ask about guests.
type guestService struct {
	lmctlv1.UnimplementedGuestsServer
	a *Agent
}

// Define implements lmctlv1.GuestsServer.
func (s *guestService) Define(ctx context.Context, in *lmctlv1.DefineRequest) (*lmctlv1.Guest, error) {
	def, err := s.a.driver.Define(in.GetDefinition())
	if err != nil {
		return nil, err
	}
	known, err := s.a.defined(ctx, def.Name, def.UUID)
	if err != nil {
		return nil, errors.Join(err, s.a.driver.Undefine(def.Name))
	}
	if known { // its definition was lost, and is back
		s.a.settler.kick(def.Name)
	}
	return s.show(def.Name)
}

// Start implements lmctlv1.GuestsServer.
func (s *guestService) Start(ctx context.Context, in *lmctlv1.GuestRequest) (*lmctlv1.Guest, error) {
	if err := s.mine(in.GetName()); err != nil {
		return nil, err
	}
	if err := s.a.driver.Start(ctx, in.GetName()); err != nil {
		return nil, err
	}
	return s.show(in.GetName())
}

// Stop implements lmctlv1.GuestsServer.
func (s *guestService) Stop(ctx context.Context, in *lmctlv1.StopRequest) (*lmctlv1.Guest, error) {
	if err := s.mine(in.GetName()); err != nil {
		return nil, err
	}
	timeout := defaultStop
	if d := in.GetTimeout(); d != nil {
		timeout = d.AsDuration()
	}
	if err := s.a.driver.Stop(ctx, in.GetName(), timeout); err != nil {
		return nil, err
	}
	return s.showEnded(in.GetName())
}

// Destroy implements lmctlv1.GuestsServer.
func (s *guestService) Destroy(ctx context.Context, in *lmctlv1.GuestRequest) (*lmctlv1.Guest, error) {
	switch s.a.ledger.Get(in.GetName()).State {
	case ledger.Contested:
		return s.giveUp(ctx, in.GetName())
	case ledger.Prepared, ledger.Withdrawn, ledger.Damaged:
		if !s.a.inbound.busy(in.GetName()) {
			return s.discard(ctx, in.GetName())
		}
	}
	if err := s.mine(in.GetName()); err != nil {
		return nil, err
	}
	if err := s.a.driver.Destroy(ctx, in.GetName()); err != nil {
		return nil, err
	}
	return s.showEnded(in.GetName())
}

// showEnded is show for a guest that has just ended: libvirt's transient ones go
// with their end.
func (s *guestService) showEnded(name string) (*lmctlv1.Guest, error) {
	g, err := s.show(name)
	if errors.Is(err, hypervisor.ErrNotFound) {
		return &lmctlv1.Guest{Name: name, Host: s.a.cfg.Name, State: string(hypervisor.StateRemoved)}, nil
	}
	return g, err
}

// giveUp removes an outranked copy, on the operator's word.
func (s *guestService) giveUp(ctx context.Context, name string) (*lmctlv1.Guest, error) {
	if err := s.a.settler.removeCopy(ctx, name); err != nil {
		return nil, err
	}
	if err := s.a.ledger.Undefine(ctx, name); err != nil {
		return nil, err
	}
	s.a.settler.kick(name)
	return &lmctlv1.Guest{Name: name, Host: s.a.cfg.Name, State: string(hypervisor.StateRemoved)}, nil
}

// discard removes what is left of a guest that was on its way here, or that
// nobody knows anything of, on the operator's word. It does not touch one that
// may have run.
func (s *guestService) discard(ctx context.Context, name string) (*lmctlv1.Guest, error) {
	g := s.a.settler.guest(name)
	if err := s.a.settler.discard(ctx, name, g); err != nil {
		return nil, err
	}
	s.a.settler.kick(name)
	return &lmctlv1.Guest{Name: name, Host: s.a.cfg.Name, State: string(hypervisor.StateRemoved)}, nil
}

// Undefine implements lmctlv1.GuestsServer.
func (s *guestService) Undefine(ctx context.Context, in *lmctlv1.GuestRequest) (*lmctlv1.UndefineResponse, error) {
	name := in.GetName()
	if _, err := s.a.driver.Get(name); err != nil {
		return nil, err
	}
	if err := s.mine(name); err != nil {
		return nil, err
	}
	if err := s.a.driver.Undefine(name); err != nil {
		return nil, err
	}
	if err := s.a.undefined(ctx, name); err != nil {
		return nil, err
	}
	s.a.metrics.left(name)
	return &lmctlv1.UndefineResponse{}, nil
}

// mine says why an operation on a guest is not this host's to do.
func (s *guestService) mine(name string) error {
	if err := ledger.CheckGuest(name); err != nil {
		return &api.Error{Code: codes.InvalidArgument, Operation: "find guest", Cause: err.Error()}
	}
	if s.a.moves.busy(name) || s.a.inbound.busy(name) {
		return &api.Error{Code: codes.FailedPrecondition, Operation: "use guest", Object: name,
			Cause: "it is being migrated: wait, or cancel the migration"}
	}
	err := s.a.ledger.Owns(name)
	if err == nil {
		return nil
	}
	if reason, open := s.a.settler.doubt(name); open {
		return &api.Error{Code: codes.FailedPrecondition, Operation: "use guest", Object: name, Result: stateInDoubt, Cause: "in doubt: " + reason}
	}
	if _, gerr := s.a.driver.Get(name); gerr != nil {
		return gerr
	}
	return err
}

// List implements lmctlv1.GuestsServer.
func (s *guestService) List(context.Context, *lmctlv1.ListGuestsRequest) (*lmctlv1.ListGuestsResponse, error) {
	out := &lmctlv1.ListGuestsResponse{}
	seen := make(map[string]bool)
	for _, info := range s.a.driver.List() {
		seen[info.Name] = true
		out.Guests = append(out.Guests, s.toWire(info))
	}
	// A guest in doubt may have nothing here but its record.
	for _, r := range s.a.ledger.List() {
		if _, open := s.a.settler.doubt(r.Guest); open && !seen[r.Guest] {
			out.Guests = append(out.Guests, s.toWire(hypervisor.Info{Name: r.Guest, UUID: r.UUID}))
		}
	}
	return out, nil
}

// Show implements lmctlv1.GuestsServer.
func (s *guestService) Show(_ context.Context, in *lmctlv1.GuestRequest) (*lmctlv1.Guest, error) {
	return s.show(in.GetName())
}

func (s *guestService) show(name string) (*lmctlv1.Guest, error) {
	info, err := s.a.driver.Get(name)
	if err != nil {
		if _, open := s.a.settler.doubt(name); !open {
			return nil, err
		}
		r := s.a.ledger.Get(name)
		info = hypervisor.Info{Name: name, UUID: r.UUID}
	}
	g := s.toWire(info)
	if err == nil {
		// One that its hypervisor has forgotten has none that can be had.
		if g.Definition, err = s.a.driver.Definition(name); err != nil && !errors.Is(err, hypervisor.ErrNotFound) {
			return nil, err
		}
	}
	return g, nil
}

// Watch implements lmctlv1.GuestsServer.
func (s *guestService) Watch(in *lmctlv1.WatchGuestsRequest, stream grpc.ServerStreamingServer[lmctlv1.GuestEvent]) error {
	ctx, cancel := s.a.untilStop(stream.Context())
	defer cancel()
	for info := range s.a.driver.Watch(ctx) {
		if in.GetName() != "" && info.Name != in.GetName() {
			continue
		}
		e := &lmctlv1.GuestEvent{Guest: &lmctlv1.Guest{Name: info.Name, Host: s.a.cfg.Name}, Removed: true}
		if info.State != hypervisor.StateRemoved {
			e = &lmctlv1.GuestEvent{Guest: s.toWire(info)}
		}
		if err := stream.Send(e); err != nil {
			return err
		}
	}
	if err := stream.Context().Err(); err != nil {
		return err
	}
	return &api.Error{Code: codes.Unavailable, Operation: "watch guests", Object: in.GetName(), Cause: "the agent is stopping"}
}

// Claim implements lmctlv1.GuestsServer.
func (s *guestService) Claim(ctx context.Context, in *lmctlv1.ClaimRequest) (*lmctlv1.Guest, error) {
	if err := s.a.settler.claim(ctx, in.GetName(), in.GetForce()); err != nil {
		return nil, err
	}
	s.a.settler.forgetDefinition(in.GetName())
	return s.show(in.GetName())
}

func (s *guestService) toWire(info hypervisor.Info) *lmctlv1.Guest {
	g := &lmctlv1.Guest{
		Name: info.Name, Uuid: info.UUID, Host: s.a.cfg.Name, State: string(info.State), Busy: info.Busy,
		Runstate: info.Runstate, Pid: int32(info.PID), MemoryBytes: info.Memory, Vcpus: int32(info.VCPUs),
		Machine: info.Machine, Accelerator: info.Accelerator, Cpu: info.CPU, HypervisorVersion: info.Version,
		Mode: info.Mode, ModeReason: info.ModeReason, LogPath: info.LogPath, ConsolePath: info.ConsolePath, ConsoleLog: info.ConsoleLog, Observer: info.Observer,
	}
	if !info.Started.IsZero() {
		g.Started = timestamppb.New(info.Started)
	}
	if e := info.End; e != nil {
		g.End = &lmctlv1.End{Cause: string(e.Cause), Signal: int32(e.Signal), Status: int32(e.Status), Detail: e.Detail, At: timestamppb.New(e.At)}
	}
	if r := s.a.ledger.Get(info.Name); r.State != ledger.None {
		g.Ownership = &lmctlv1.Ownership{State: string(r.State), Epoch: r.Epoch, Handover: handoverToWire(r.Handover)}
	}
	incoming := s.a.inbound.busy(info.Name)
	if incoming && g.Busy == "" {
		g.Busy = "incoming migration" // it runs here already; the rest of the migration is under way
	}
	if mv := s.a.moves.of(info.Name); mv != nil {
		g.Migration = mv.id
		if info.State == hypervisor.StateRunning || info.State == hypervisor.StatePaused {
			g.State = string(hypervisor.StateMigrating)
		}
	} else if reason, open := s.a.settler.doubt(info.Name); open && !incoming {
		g.State, g.Advice = stateInDoubt, reason
	}
	return g
}

// discard is guestService's.
func (s *settler) discard(ctx context.Context, name string, g *openGuest) error {
	refuse := func(cause string) error {
		return &api.Error{Code: codes.FailedPrecondition, Operation: "destroy guest", Object: name, Cause: cause}
	}
	g.act.Lock()
	defer g.act.Unlock()
	_, err := s.a.driver.Get(name)
	switch facts := s.facts(name); {
	case s.a.ledger.Get(name).State == ledger.Damaged && err == nil:
		return refuse(fmt.Sprintf("its record cannot be read, but it is here: `lmctl guest claim %s --force` makes it this host's, if no other host runs it", name))
	case facts.Busy:
		return refuse("it is being migrated: wait, or cancel the migration")
	case facts.Copy == ledger.UnknownCopy:
		return refuse("its process here cannot be reached: wait until it can, or restart the agent")
	case facts.Shell:
		if err := s.endShell(ctx, name, g); err != nil {
			return err
		}
	case facts.Copy == ledger.NoCopy:
		if err := errors.Join(s.dropShell(g), s.removeCopy(ctx, name)); err != nil {
			return err
		}
	default:
		return refuse(fmt.Sprintf("it is %s here, and this host's record does not say that it may be ended; `lmctl guest claim %s --force` first", facts.Copy, name))
	}
	s.a.log.Warn("guest discarded by the operator", "guest", name)
	if err := s.a.ledger.Discard(ctx, name); err != nil {
		return err
	}
	s.note(g, name, ledger.Decision{Action: ledger.Rest})
	return nil
}

// uuidOf is the UUID of a guest that is here, or of which this host has a
// record and a definition to restore.
func (s *settler) uuidOf(name string) (string, error) {
	info, err := s.a.driver.Get(name)
	if err == nil && info.UUID != "" {
		return info.UUID, nil
	}
	r := s.a.ledger.Get(name)
	switch {
	case r.UUID != "" && r.State != ledger.Gone:
		return r.UUID, nil
	case r.State == ledger.Damaged:
		return "", &api.Error{Code: codes.FailedPrecondition, Operation: "claim guest", Object: name,
			Cause: fmt.Sprintf("its record and its definition are lost: `lmctl guest destroy %s` forgets the record, then define it again", name)}
	}
	return "", err
}

// claim makes a guest this host's, on the operator's word, and runs what this
// host has of it.
func (s *settler) claim(ctx context.Context, name string, force bool) error {
	refuse := func(format string, args ...any) error {
		return &api.Error{Code: codes.FailedPrecondition, Operation: "claim guest", Object: name, Cause: fmt.Sprintf(format, args...)}
	}
	if err := ledger.CheckGuest(name); err != nil {
		return &api.Error{Code: codes.InvalidArgument, Operation: "claim guest", Cause: err.Error()}
	}
	uuid, err := s.uuidOf(name)
	if err != nil {
		return err
	}
	if s.a.moves.busy(name) || s.a.inbound.busy(name) {
		return refuse("it is being migrated: wait, or cancel the migration")
	}
	others, where := s.highestEpoch(ctx, name, uuid)
	g := s.guest(name)
	g.act.Lock()
	defer g.act.Unlock()
	r := s.a.ledger.Get(name)
	if r.State == ledger.Owned {
		return refuse("it is this host's already")
	}
	if !force {
		known := "no other host that can be reached says that it is its own"
		if where != "" {
			known = fmt.Sprintf("host %s says that it is its own", where)
		}
		return refuse("%s; if it is certain that it runs nowhere else, and never will, add --force", known)
	}
	facts := s.facts(name)
	if facts.Copy == ledger.UnknownCopy {
		return refuse("its process here cannot be reached, so that nobody knows whether it runs: wait until it can, or restart the agent")
	}
	if err := s.restoreDefinition(name); err != nil {
		return err
	}
	if facts.Shell && facts.Copy == ledger.PausedCopy && r.State != ledger.Prepared && r.State != ledger.Accepted {
		return refuse("what is here is a shell that has not got the whole guest")
	}
	s.a.log.Warn("guest claimed by the operator", "guest", name, "record", r.State, "epoch", r.Epoch)
	if facts.Shell {
		// The shell is complete: it becomes the guest as if it had been handed
		// over, and then outranks what the other host may have.
		if err := s.run(ctx, r, facts, g); err != nil {
			return err
		}
		return s.a.ledger.Claim(ctx, name, uuid, others)
	}
	if err := s.a.ledger.Claim(ctx, name, uuid, others); err != nil {
		return err
	}
	s.note(g, name, ledger.Decision{Action: ledger.Rest})
	return s.goOn(context.WithoutCancel(ctx), name, facts)
}

// highestEpoch asks every host that can be reached what it knows of a guest,
// and returns the highest epoch and who owns it.
func (s *settler) highestEpoch(ctx context.Context, name, uuid string) (epoch uint64, owner string) {
	for host := range s.a.cfg.Peers {
		heard, err := s.a.peers.settle(ctx, host, ledger.Statement{Host: s.a.cfg.Name, Guest: name})
		if err != nil {
			s.a.log.Warn("a host could not be asked about a claimed guest", "guest", name, "peer", host, "error", err)
			continue
		}
		if heard.UUID != uuid {
			continue
		}
		epoch = max(epoch, heard.Epoch)
		if heard.State == ledger.Owned || heard.State == ledger.Moving {
			owner = host
		}
	}
	return epoch, owner
}
