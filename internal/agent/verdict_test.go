package agent

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/pki"
)

// find is the line of a name, or an empty one.
func find(lines []*lmctlv1.CheckLine, name string) *lmctlv1.CheckLine {
	if i := slices.IndexFunc(lines, func(l *lmctlv1.CheckLine) bool { return l.Name == name }); i >= 0 {
		return lines[i]
	}
	return &lmctlv1.CheckLine{}
}

// TestVerdict asks for a verdict what a migration would meet, and sees that no
// migration comes of it.
func TestVerdict(t *testing.T) {
	s := newSite(t, "alpha", "beta", "gamma") // gamma does not answer
	d, there := newFake(), newFake()
	a := s.agent(s.config("alpha"), d)
	b := s.agent(s.config("beta"), there)
	c := s.serve(a)
	s.serve(b)
	ctx := t.Context()
	if _, err := c.Guests.Define(ctx, &lmctlv1.DefineRequest{Definition: []byte(definition)}); err != nil {
		t.Fatal(err)
	}
	d.set("g", func(i *hypervisor.Info) {
		i.State, i.Mode, i.ModeReason = hypervisor.StateRunning, "direct", "it is a fake"
	})
	check := func(host string) *lmctlv1.MigrationVerdict {
		t.Helper()
		v, err := c.Migrations.Check(ctx, &lmctlv1.StartMigrationRequest{Guest: "g", Destination: host})
		if err != nil {
			t.Fatal(err)
		}
		return v
	}

	v := check("beta")
	if l := find(v.Source, "device"); v.Ok || l.Verdict != fail || l.Advice != "detach it" || find(v.Source, "state").Verdict != pass {
		t.Errorf("a guest that cannot move: %v", v)
	}
	if len(v.Destination) < 3 || !strings.Contains(strings.Join(there.history(), "\n"), `examine g of alpha with "of g"`) {
		t.Errorf("the destination was not asked: %v, %q", v, there.history())
	}
	d.movable = true
	v = check("beta")
	if !v.Ok || v.Mode != "direct" || v.ModeReason != "it is a fake" {
		t.Errorf("a guest that can move: %v", v)
	}
	if l := find(v.Destination, "bridge br0"); l.Verdict != warn || l.Detail != "it is [2J down" {
		t.Errorf("the destination's word: %v", l)
	}
	if l := find(v.Destination, "record"); l.Verdict != pass {
		t.Errorf("the destination's record: %v", l)
	}
	v = check("gamma")
	if l := find(v.Destination, "host gamma"); v.Ok || l.Verdict != fail || !strings.Contains(l.Advice, "firewall") || len(v.Destination) != 1 {
		t.Errorf("a host that does not answer: %v", v)
	}
	for host, want := range map[string]string{"alpha": "already", "nowhere": "not known"} {
		if v = check(host); v.Ok || !strings.Contains(find(v.Source, "guest").Detail, want) || len(v.Destination) != 0 {
			t.Errorf("to %s: %v", host, v)
		}
	}
	if list, err := c.Migrations.List(ctx, &lmctlv1.ListMigrationsRequest{}); err != nil || len(list.Migrations) != 0 {
		t.Errorf("migrations: %v %v", list, err)
	}
	if len(d.history()) != 0 || b.ledger.Get("g").State != "" {
		t.Errorf("something was done: %q, %v", d.history(), b.ledger.Get("g"))
	}
}

func TestVerdictRefusals(t *testing.T) {
	s := newSite(t, "alpha", "beta")
	a := s.agent(s.config("alpha"), newFake())
	c := s.serve(a)
	ctx := t.Context()
	_, err := c.Migrations.Check(ctx, &lmctlv1.StartMigrationRequest{Guest: "ghost", Destination: "beta"})
	codeIs(t, err, codes.NotFound)
	none := int32(0)
	_, err = c.Migrations.Check(ctx, &lmctlv1.StartMigrationRequest{Guest: "ghost", Destination: "beta", Options: &lmctlv1.MigrationOptions{Streams: &none}})
	codeIs(t, err, codes.InvalidArgument)
	_, err = c.Peer.Examine(ctx, &lmctlv1.ExamineRequest{Guest: "g"})
	codeIs(t, err, codes.PermissionDenied) // by root: it is for other agents

	peer := s.client(api.Target{Address: s.peers["alpha"], Identity: s.identity(pki.Host, "beta"), Host: "alpha"})
	_, err = peer.Peer.Examine(ctx, &lmctlv1.ExamineRequest{Guest: "../g"})
	codeIs(t, err, codes.InvalidArgument)
	if _, err := c.Guests.Define(ctx, &lmctlv1.DefineRequest{Definition: []byte(definition)}); err != nil {
		t.Fatal(err)
	}
	answer, err := peer.Peer.Examine(ctx, &lmctlv1.ExamineRequest{Guest: "g", Uuid: "another"})
	if err != nil {
		t.Fatal(err)
	}
	if l := find(answer.Lines, "record"); l.Verdict != fail || !strings.Contains(l.Detail, "this host's") {
		t.Errorf("a guest that is here: %v", answer)
	}
}

func TestHeard(t *testing.T) {
	lines := heard([]*lmctlv1.CheckLine{{Name: "a\nb", Detail: "\x1b[1m", Advice: "x\r"}, nil})
	if len(lines) != 2 || lines[0].Name != "a b" || lines[0].Detail != " [1m" || lines[0].Advice != "x " || lines[0].Verdict != fail || lines[1].Verdict != fail {
		t.Errorf("%v", lines)
	}
	if lines := heard(make([]*lmctlv1.CheckLine, maxLines+1)); len(lines) != 1 || lines[0].Verdict != fail {
		t.Errorf("%d lines", len(lines))
	}
}
