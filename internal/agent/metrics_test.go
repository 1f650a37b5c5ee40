package agent

import (
	"testing"
	"time"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/migrate"
)

// value is a metric as it is exposed, by its name and the value of its label.
func value(t *testing.T, a *Agent, name, label string) (float64, bool) {
	t.Helper()
	families, err := a.metrics.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() != name || label != "" && (len(m.GetLabel()) != 1 || m.GetLabel()[0].GetValue() != label) {
				continue
			}
			return m.GetCounter().GetValue() + m.GetGauge().GetValue(), true
		}
	}
	return 0, false
}

// TestMetricsOfAMigration: a migration is to be seen while it is under way, is
// counted once, and nothing of a guest is left that is not here any more.
func TestMetricsOfAMigration(t *testing.T) {
	ctx := t.Context()
	s := newSite(t, "alpha", "beta")
	d := newFake()
	d.held = make(chan struct{})
	a := s.agent(s.config("alpha"), d)
	c := s.serve(a)
	if _, err := c.Guests.Define(ctx, &lmctlv1.DefineRequest{Definition: []byte(definition)}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Guests.Start(ctx, &lmctlv1.GuestRequest{Name: "g"}); err != nil {
		t.Fatal(err)
	}
	m, err := c.Migrations.Start(ctx, &lmctlv1.StartMigrationRequest{Guest: "g", Destination: "beta"})
	if err != nil {
		t.Fatal(err)
	}
	<-d.held
	if g, err := c.Guests.Show(ctx, &lmctlv1.GuestRequest{Name: "g"}); err != nil || g.GetState() != "migrating" {
		t.Errorf("guest: %v %v", g, err)
	}
	expect := func(name, label string, want float64) {
		t.Helper()
		if got, ok := value(t, a, name, label); !ok || got != want {
			t.Errorf("%s %s: %v %t, want %v", name, label, got, ok, want)
		}
	}
	expect("lmctl_guests", "migrating", 1)
	expect("lmctl_guests", "running", 0)

	mv := a.moves.of("g")
	first := migrate.Pass{N: 1, Pages: 100, ZeroPages: 40, Duration: 2 * time.Second, DirtyAfter: 10}
	second := migrate.Pass{N: 2, Pages: 10, Duration: time.Second, DirtyAfter: 3}
	a.moves.progress(mv, migrate.Progress{State: migrate.SourceCopying, BytesSent: 500, Passes: []migrate.Pass{first}})
	expect("lmctl_migration_sent_bytes_total", "", 500)
	expect("lmctl_migration_passes_total", "", 1)
	expect("lmctl_guest_dirty_bytes_per_second", "g", 5*migrate.PageSize)
	a.moves.progress(mv, migrate.Progress{State: migrate.SourceCopying, BytesSent: 700, Passes: []migrate.Pass{first, second}})
	a.moves.progress(mv, migrate.Progress{State: migrate.SourceAborting, BytesSent: 700, Passes: []migrate.Pass{first, second}})
	expect("lmctl_migration_sent_bytes_total", "", 700)
	expect("lmctl_migration_passes_total", "", 2)
	expect("lmctl_migration_pages_total", "zero", 40)
	expect("lmctl_migration_pages_total", "data", 70)
	expect("lmctl_guest_dirty_bytes_per_second", "g", 3*migrate.PageSize)

	if _, err := c.Migrations.Cancel(ctx, &lmctlv1.MigrationRequest{Id: m.GetId()}); err != nil {
		t.Fatal(err)
	}
	until(t, "the migration ends", func() bool { return !a.moves.busy("g") })
	expect("lmctl_migrations_total", "cancelled", 1)
	if _, err := c.Guests.Destroy(ctx, &lmctlv1.GuestRequest{Name: "g"}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Guests.Undefine(ctx, &lmctlv1.GuestRequest{Name: "g"}); err != nil {
		t.Fatal(err)
	}
	if got, ok := value(t, a, "lmctl_guest_dirty_bytes_per_second", "g"); ok {
		t.Errorf("the dirty rate of a guest that is gone: %v", got)
	}
}

// TestCheckNamesBridges: the check always says what bridges there are.
func TestCheckNamesBridges(t *testing.T) {
	s := newSite(t, "alpha")
	lines := s.agent(s.config("alpha"), newFake()).checkBridges()
	if len(lines) != 1 || lines[0].GetName() != "bridges" || lines[0].GetDetail() == "" {
		t.Fatalf("lines: %v", lines)
	}
	if none := lines[0].GetDetail() == "none"; none != (lines[0].GetVerdict() == warn) || none != (lines[0].GetAdvice() != "") {
		t.Errorf("line: %v", lines[0])
	}
}
