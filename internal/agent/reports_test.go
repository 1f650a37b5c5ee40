package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/ledger"
	"github.com/lmctl/lmctl/migrate"
)

// TestMigrationOutlivedByItsRecord: a migration whose agent dies is not lost.
// The next agent says what came of it, as far as the ledger does.
func TestMigrationOutlivedByItsRecord(t *testing.T) {
	type step = func(*ledger.Ledger, context.Context, migrate.Handover) error
	for _, tc := range []struct {
		name   string
		steps  []step
		result migrate.Result
		words  string
	}{
		{"before the pause", nil, migrate.Failed, "the agent ended during the migration"},
		{"in the pause", []step{(*ledger.Ledger).Begin}, migrate.Failed, "the agent ended during the migration"},
		{"handed over", []step{(*ledger.Ledger).Begin, (*ledger.Ledger).HandOver}, migrate.InDoubt, "has not said yet"},
		{"acknowledged", []step{(*ledger.Ledger).Begin, (*ledger.Ledger).HandOver, (*ledger.Ledger).Forget}, migrate.Completed, "what was measured is lost"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := t.Context()
			s := newSite(t, "alpha", "beta")
			a := s.agent(s.config("alpha"), newFake())
			mv := &move{id: "11111111-2222", guest: "g", destination: "beta", started: time.Now()}
			a.moves.keepBegun(mv)
			h := migrate.Handover{ID: mv.id, Guest: "g", UUID: "uuid-g", Source: "alpha", Destination: "beta", Epoch: 2}
			if err := a.ledger.Define(ctx, "g", "uuid-g"); err != nil {
				t.Fatal(err)
			}
			for _, do := range tc.steps {
				if err := do(a.ledger, ctx, h); err != nil {
					t.Fatal(err)
				}
			}
			for range 2 { // the second time it is read as it was closed
				again, err := newMoves(a)
				if err != nil {
					t.Fatal(err)
				}
				all := again.list()
				if len(all) != 1 || all[0].report == nil || all[0].ended.IsZero() {
					t.Fatalf("migrations: %+v", all)
				}
				if r := all[0].report; r.ID != mv.id || r.Result != tc.result || !strings.Contains(r.Error, tc.words) || r.Destination != "beta" {
					t.Errorf("report: %+v", r)
				}
			}
		})
	}
}

// TestReportsInDoubtAreSettled: the report of a migration that ended in doubt
// says how it came out once the hosts have settled it.
func TestReportsInDoubtAreSettled(t *testing.T) {
	for _, tc := range []struct {
		name  string
		shell bool
		want  migrate.Result
	}{
		{"the destination has it", true, migrate.Completed},
		{"the destination never ran it", false, migrate.Failed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := t.Context()
			s := newSite(t, "alpha", "beta")
			da, db := newFake(), newFake()
			da.set("g", func(i *hypervisor.Info) { i.State, i.PID, i.Suspended = hypervisor.StateMigrating, 1, true })
			ca, cb := s.config("alpha"), s.config("beta")
			h := migrate.Handover{ID: "11111111-2222", Guest: "g", UUID: "uuid-g", Source: "alpha", Destination: "beta", Epoch: 2}
			prepareLedger(t, ca, func(l *ledger.Ledger) error {
				return errors.Join(l.Define(ctx, "g", "uuid-g"), l.Begin(ctx, h), l.HandOver(ctx, h))
			})
			if tc.shell {
				db.set("g", func(i *hypervisor.Info) { i.State, i.PID = hypervisor.StateIncoming, 1 })
			}
			prepareLedger(t, cb, func(l *ledger.Ledger) error { return l.Prepare(ctx, h) })
			before := &moves{a: &Agent{cfg: ca}, dir: filepath.Join(ca.StateDir, "migrations")}
			if err := os.MkdirAll(before.dir, 0o700); err != nil {
				t.Fatal(err)
			}
			before.keepBegun(&move{id: h.ID, guest: "g", destination: "beta", started: time.Now()})
			alpha := s.agent(ca, da)
			c := s.serve(alpha)
			show := func() *lmctlv1.Migration {
				m, err := c.Migrations.Show(ctx, &lmctlv1.MigrationRequest{Id: h.ID})
				if err != nil {
					t.Fatal(err)
				}
				return m
			}
			if m := show(); m.GetResult() != string(migrate.InDoubt) || !m.GetFinished() {
				t.Fatalf("before they meet: %v", m)
			}
			s.serve(s.agent(cb, db))
			until(t, "the report is settled", func() bool { return show().GetResult() != string(migrate.InDoubt) })
			m := show()
			if m.GetResult() != string(tc.want) || m.GetState() != string(stateOfResult(tc.want)) {
				t.Errorf("settled: %v", m)
			}
			again, err := newMoves(alpha)
			if err != nil || again.list()[0].report.Result != tc.want {
				t.Errorf("it was not kept: %v", err)
			}
		})
	}
}
