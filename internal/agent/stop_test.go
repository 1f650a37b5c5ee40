package agent

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/migrate"
)

// TestStop: an agent that is told to stop takes on nothing new, waits for the
// migration under way, and cancels it when it is told to hurry or its time is
// up.
func TestStop(t *testing.T) {
	for _, tc := range []struct {
		name    string
		timeout time.Duration
		hurry   bool
	}{
		{"hurry", time.Hour, true},
		{"time is up", 0, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newSite(t, "alpha", "beta")
			cfg := s.config("alpha")
			cfg.StopTimeout = tc.timeout
			d := newFake()
			d.held = make(chan struct{})
			a := s.agent(cfg, d)
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			hurry, hurried := context.WithCancel(t.Context())
			defer hurried()
			done := make(chan error, 1)
			go func() { done <- a.Run(ctx, hurry) }()
			var c *api.Client
			until(t, "the agent answers", func() bool {
				c = s.client(api.Target{Socket: cfg.Socket})
				_, err := c.Guests.List(t.Context(), &lmctlv1.ListGuestsRequest{})
				return err == nil
			})
			if _, err := c.Guests.Define(t.Context(), &lmctlv1.DefineRequest{Definition: []byte(definition)}); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Migrations.Start(t.Context(), &lmctlv1.StartMigrationRequest{Guest: "g", Destination: "beta"}); err != nil {
				t.Fatal(err)
			}
			<-d.held
			stop()
			if tc.hurry {
				until(t, "new migrations are refused", func() bool {
					_, err := c.Migrations.Start(t.Context(), &lmctlv1.StartMigrationRequest{Guest: "g", Destination: "beta"})
					return codeIs(t, err, codes.Unavailable, codes.FailedPrecondition).Code == codes.Unavailable
				})
				select {
				case err := <-done:
					t.Fatalf("the agent did not wait: %v", err)
				default:
				}
				hurried()
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			all := a.moves.list()
			if len(all) != 1 || all[0].report == nil || all[0].report.Result == migrate.Completed {
				t.Errorf("migrations after the stop: %+v", all)
			}
			if a.ledger.Owns("g") != nil {
				t.Error("the guest is not this host's any more")
			}
		})
	}
}

// TestStopTellsHowItEnded: whoever watches a migration when the agent stops
// hears how it ended; whoever watches guests does not hold the stop up.
func TestStopTellsHowItEnded(t *testing.T) {
	s := newSite(t, "alpha", "beta")
	cfg := s.config("alpha")
	cfg.StopTimeout = 0
	d := newFake()
	d.held = make(chan struct{})
	a := s.agent(cfg, d)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	done := make(chan error, 1)
	var c *api.Client
	go func() { done <- a.Run(ctx, t.Context()) }()
	until(t, "the agent answers", func() bool {
		c = s.client(api.Target{Socket: cfg.Socket})
		_, err := c.Guests.List(t.Context(), &lmctlv1.ListGuestsRequest{})
		return err == nil
	})
	if _, err := c.Guests.Define(t.Context(), &lmctlv1.DefineRequest{Definition: []byte(definition)}); err != nil {
		t.Fatal(err)
	}
	m, err := c.Migrations.Start(t.Context(), &lmctlv1.StartMigrationRequest{Guest: "g", Destination: "beta"})
	if err != nil {
		t.Fatal(err)
	}
	watch, err := c.Migrations.Watch(t.Context(), &lmctlv1.MigrationRequest{Id: m.GetId()})
	if err != nil {
		t.Fatal(err)
	}
	guests, err := c.Guests.Watch(t.Context(), &lmctlv1.WatchGuestsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err != nil {
		t.Fatal(err)
	}
	<-d.held
	stop()
	for !m.GetFinished() {
		if m, err = watch.Recv(); err != nil {
			t.Fatalf("the end was not told: %v", err)
		}
	}
	if m.GetResult() != string(migrate.Cancelled) {
		t.Errorf("result %s: %s", m.GetResult(), m.GetError())
	}
	_, err = guests.Recv()
	codeIs(t, err, codes.Unavailable)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
