package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/ledger"
	"github.com/lmctl/lmctl/migrate"
)

// Check implements lmctlv1.MigrationsServer.
func (s *migrationService) Check(ctx context.Context, in *lmctlv1.StartMigrationRequest) (*lmctlv1.MigrationVerdict, error) {
	opts, err := s.options(in.GetOptions())
	if err != nil {
		return nil, &api.Error{Code: codes.InvalidArgument, Operation: "check migration of guest", Object: in.GetGuest(), Cause: err.Error()}
	}
	return s.a.verdict(ctx, in.GetGuest(), in.GetDestination(), opts)
}

// verdict says what a migration would meet, on both hosts.
func (a *Agent) verdict(ctx context.Context, guest, destination string, opts migrate.Options) (*lmctlv1.MigrationVerdict, error) {
	if _, err := a.driver.Get(guest); err != nil {
		return nil, err
	}
	v := &lmctlv1.MigrationVerdict{}
	var c hypervisor.Checks
	var offer *lmctlv1.ExamineRequest
	err := a.moves.admit(guest, destination)
	if err == nil {
		err = a.moves.room(guest)
	}
	if err != nil {
		c.Fail("guest", reasonOf(err), "")
	} else {
		c.Pass("guest", "this host's, at epoch %d", a.ledger.Get(guest).Epoch)
		offer = a.examineSource(ctx, guest, opts, &c)
	}
	v.Source = checksToWire(c)
	if _, err := a.peers.address(destination); err == nil {
		v.Destination = a.examineDestination(ctx, destination, offer)
	}
	v.Ok = offer != nil && passes(v.Source) && passes(v.Destination)
	if offer != nil {
		v.Mode = offer.Mode
	}
	if info, err := a.driver.Get(guest); err == nil && (v.Mode == "" || v.Mode == info.Mode) {
		v.ModeReason = info.ModeReason
	} else {
		v.ModeReason = "it was asked for"
	}
	return v, nil
}

// reasonOf is what an error of our own says, without what it is about.
func reasonOf(err error) string {
	var known *api.Error
	if errors.As(err, &known) {
		return known.Cause
	}
	return err.Error()
}

// examineSource asks the guest's hypervisor, and returns what the destination is
// to be asked; nil if the guest cannot be described.
func (a *Agent) examineSource(ctx context.Context, guest string, opts migrate.Options, c *hypervisor.Checks) *lmctlv1.ExamineRequest {
	held, err := a.driver.Source(guest)
	var state *hypervisor.StateError
	switch {
	case errors.As(err, &state):
		c.Fail("state", fmt.Sprintf("the guest is %s", state.State), "only one that runs can be moved")
		return nil
	case err != nil:
		c.Err("state", err)
		return nil
	}
	defer func() {
		if err := held.Close(); err != nil {
			a.log.Error("give the guest back", "guest", guest, "error", err)
		}
	}()
	e, err := held.Examine(ctx)
	if err != nil {
		c.Err("hypervisor", err)
		return nil
	}
	mode, checks := e.Choose(opts.Mode)
	c.Add(checks)
	if mode == migrate.Relay && opts.Verify {
		c.Fail("verification", "in relay mode the memory is not the agent's to read, and cannot be verified", "migrate without verification")
	}
	text, err := held.Definition(ctx)
	if err != nil {
		c.Err("definition", err)
		return nil
	}
	return &lmctlv1.ExamineRequest{Guest: guest, Uuid: held.UUID(), Definition: text, Mode: string(mode)}
}

// examineTimeout bounds what another host takes for an examination. It may have
// to read all of a file that a guest boots from.
const examineTimeout = 2 * time.Minute

// examineDestination asks a host about a guest, or whether it answers at all.
func (a *Agent) examineDestination(ctx context.Context, host string, offer *lmctlv1.ExamineRequest) []*lmctlv1.CheckLine {
	lines := []*lmctlv1.CheckLine{a.checkPeer(ctx, host)}
	if lines[0].Verdict == fail || offer == nil {
		return lines
	}
	ctx, cancel := context.WithTimeout(ctx, examineTimeout)
	defer cancel()
	c, err := a.peers.client(host)
	if err != nil {
		return append(lines, line("guest", fail, err.Error(), ""))
	}
	answer, err := c.Peer.Examine(ctx, offer)
	var known *api.Error
	switch {
	case errors.As(err, &known) && known.Code == codes.Unimplemented, status.Code(err) == codes.Unimplemented:
		return append(lines, line("agent", fail, "it cannot be asked about a guest", "run the same lmctl on both hosts"))
	case err != nil:
		return append(lines, line("guest", fail, printable(reasonOf(err)), "see the log of its agent"))
	}
	return append(lines, heard(answer.GetLines())...)
}

// maxLines bounds what is shown of another host's answer.
const maxLines = 256

// heard is another host's answer as it may be shown: no line without a verdict,
// and nothing that a terminal would obey.
func heard(lines []*lmctlv1.CheckLine) []*lmctlv1.CheckLine {
	if len(lines) > maxLines {
		return []*lmctlv1.CheckLine{line("guest", fail, fmt.Sprintf("it answers with %d lines, more than %d", len(lines), maxLines), "")}
	}
	out := make([]*lmctlv1.CheckLine, len(lines))
	for i, l := range lines {
		v := l.GetVerdict()
		if v != pass && v != warn {
			v = fail
		}
		out[i] = line(printable(l.GetName()), v, printable(l.GetDetail()), printable(l.GetAdvice()))
	}
	return out
}

// printable is a text without what a terminal would obey.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
}

func passes(lines []*lmctlv1.CheckLine) bool {
	for _, l := range lines {
		if l.GetVerdict() == fail {
			return false
		}
	}
	return true
}

func checksToWire(checks hypervisor.Checks) []*lmctlv1.CheckLine {
	verdicts := map[hypervisor.Verdict]lmctlv1.CheckLine_Verdict{hypervisor.Pass: pass, hypervisor.Warn: warn, hypervisor.Fail: fail}
	lines := make([]*lmctlv1.CheckLine, len(checks))
	for i, c := range checks {
		lines[i] = line(c.Name, verdicts[c.Verdict], c.Detail, c.Advice)
	}
	return lines
}

// maxExaminations is how many guests other hosts may ask about at a time.
const maxExaminations = 4

// Examine implements lmctlv1.PeerServer.
func (s *peerService) Examine(ctx context.Context, in *lmctlv1.ExamineRequest) (*lmctlv1.CheckResponse, error) {
	who, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	if err := ledger.CheckGuest(in.GetGuest()); err != nil {
		return nil, &api.Error{Code: codes.InvalidArgument, Operation: "examine guest", Cause: err.Error()}
	}
	select {
	case s.a.examining <- struct{}{}:
		defer func() { <-s.a.examining }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, examineTimeout)
	defer cancel()
	var c hypervisor.Checks
	s.examineRecord(who.name, in, &c)
	more, err := s.a.driver.Examine(ctx, migrate.Offer{Source: who.name, Guest: in.GetGuest(), UUID: in.GetUuid(),
		Definition: in.GetDefinition(), Mode: migrate.Mode(in.GetMode())})
	if err != nil {
		return nil, err
	}
	c.Add(more)
	return &lmctlv1.CheckResponse{Lines: checksToWire(c)}, nil
}

// examineRecord says whether this host's record of the guest lets it come, at
// whatever epoch.
func (s *peerService) examineRecord(source string, in *lmctlv1.ExamineRequest, c *hypervisor.Checks) {
	_, err := ledger.Step(s.a.ledger.Get(in.GetGuest()), ledger.OpPrepare, migrate.Handover{
		ID: "examination", Guest: in.GetGuest(), UUID: in.GetUuid(), Source: source, Destination: s.a.cfg.Name, Epoch: maxEpoch,
	}, s.a.ledger.Boot())
	var state *ledger.StateError
	switch {
	case errors.As(err, &state):
		c.Fail("record", fmt.Sprintf("host %s cannot take guest %s: %s", s.a.cfg.Name, in.GetGuest(), state.Reason), "")
	case err != nil:
		c.Err("record", err)
	default:
		c.Pass("record", "nothing of an earlier migration is unsettled")
	}
}
