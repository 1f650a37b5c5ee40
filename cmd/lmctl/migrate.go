package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/migrate"
)

const migrateLong = `Moves a running guest to another host. Its memory is copied while it runs, in at
most --max-passes passes; then it stops for some milliseconds, the rest follows,
and it goes on at the destination, with its connections.

Until the destination has all of it, any failure, and Ctrl-C, leaves the guest
running where it is. The exit code says which it was: 0 moved, 3 refused before
anything was copied, 4 failed or cancelled, 5 in doubt (see lmctl guest claim).

With --dry-run both hosts say line by line what they find, and nothing is done:
the exit code is 0 if the migration would begin, and 3 if it would be refused.`

type migrateFlags struct {
	maxPasses int32
	target    time.Duration
	bandwidth rateValue
	streams   int32
	verify    bool
	mode      string
	compress  bool
	timeout   time.Duration
	detach    bool
	dryRun    bool
}

func newMigrateCommand(o *options) *cobra.Command {
	var f migrateFlags
	cmd := &cobra.Command{
		Use: "migrate GUEST HOST", Short: "Move a running guest to another host", Long: migrateLong,
		Example: "  lmctl migrate web host2\n  lmctl migrate web host2 --verify --json\n  lmctl migrate web host2 --dry-run\n  lmctl migrate web host2 --bandwidth 100MiB/s --detach",
		Args:    takes("GUEST", "HOST"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			req := &lmctlv1.StartMigrationRequest{Guest: args[0], Destination: args[1], Options: f.options(cmd)}
			if f.dryRun {
				return o.withAgent(func(c *api.Client) error { return o.dryRun(cmd.Context(), c, req) })
			}
			return o.withAgent(func(c *api.Client) error { return o.migrate(cmd.Context(), c, req, f.detach) })
		},
	}
	flags := cmd.Flags()
	flags.Int32Var(&f.maxPasses, "max-passes", migrate.DefaultMaxPasses, "passes at most while the guest runs")
	flags.DurationVar(&f.target, "downtime-target", migrate.DefaultDowntimeTarget, "switch over as soon as the rest can be sent in this time")
	flags.Var(&f.bandwidth, "bandwidth", "limit while the guest runs, like 100MiB/s; 0 for none")
	flags.Int32Var(&f.streams, "streams", migrate.DefaultStreams, "parallel connections, 1 to 16")
	flags.BoolVar(&f.verify, "verify", false, "compare every page on both hosts while the guest stands still, which makes that longer")
	flags.StringVar(&f.mode, "mode", "", "how the memory gets across: direct or relay; the best that the guest can have if not given (see lmctl guest show)")
	flags.BoolVar(&f.compress, "compress", false, "compress what travels, in relay mode")
	flags.DurationVar(&f.timeout, "timeout", 0, "give up after this time; 0 for never")
	flags.BoolVar(&f.detach, "detach", false, "print the migration's id and leave it to the agent")
	flags.BoolVar(&f.dryRun, "dry-run", false, "only say whether it would be refused, and what both hosts find")
	return cmd
}

// options are those that were given; the agent has defaults for the rest.
func (f *migrateFlags) options(cmd *cobra.Command) *lmctlv1.MigrationOptions {
	given := func(name string) bool { return cmd.Flags().Changed(name) }
	m := &lmctlv1.MigrationOptions{Verify: f.verify, Mode: f.mode, Compress: f.compress}
	if given("max-passes") {
		m.MaxPasses = &f.maxPasses
	}
	if given("downtime-target") {
		m.DowntimeTarget = durationpb.New(f.target)
	}
	if given("bandwidth") {
		n := int64(f.bandwidth)
		m.Bandwidth = &n
	}
	if given("streams") {
		m.Streams = &f.streams
	}
	if given("timeout") {
		m.Timeout = durationpb.New(f.timeout)
	}
	return m
}

// check refuses values that no agent takes.
func (f *migrateFlags) check() error {
	switch mode := migrate.Mode(f.mode); {
	case mode != "" && mode != migrate.Direct && mode != migrate.Relay:
		return usagef("--mode %s: %s or %s", f.mode, migrate.Direct, migrate.Relay)
	case mode == migrate.Direct && f.compress:
		return usagef("--compress is for relay mode")
	case mode == migrate.Relay && f.verify:
		return usagef("--verify is for direct mode: in relay mode the memory is QEMU's alone to read")
	case f.dryRun && f.detach:
		return usagef("--dry-run begins nothing that could be left to the agent: give it or --detach")
	case f.maxPasses < 1:
		return usagef("--max-passes %d: at least 1", f.maxPasses)
	case f.target <= 0:
		return usagef("--downtime-target %v: must be longer than nothing, like 30ms", f.target)
	case f.streams < 1 || f.streams > migrate.MaxStreams:
		return usagef("--streams %d: 1 to %d", f.streams, migrate.MaxStreams)
	case f.timeout < 0:
		return usagef("--timeout %v: 0 for never, or a time like 5m", f.timeout)
	}
	return nil
}

func (o *options) migrate(ctx context.Context, c *api.Client, req *lmctlv1.StartMigrationRequest, detach bool) error {
	// From before the start, so that no Ctrl-C leaves a migration unattended.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(signals)
	m, err := c.Migrations.Start(ctx, req)
	if err != nil {
		return o.refused(req, err)
	}
	if detach {
		if o.json {
			return printJSON(o.out, map[string]string{"id": m.Id, "guest": m.Guest, "destination": m.Destination})
		}
		_, err := fmt.Fprintf(o.out, "%s\n", m.Id)
		return err
	}
	return o.follow(ctx, c, m.Id, signals)
}

// refused prints a refusal that came before there was a migration as the
// account of one, so that --json always gives the same object.
func (o *options) refused(req *lmctlv1.StartMigrationRequest, err error) error {
	var remote *api.Error
	if !o.json || !errors.As(err, &remote) || remote.Result != string(migrate.Refused) {
		return err
	}
	r := migrate.Report{Guest: req.Guest, Destination: req.Destination, Mode: cmp.Or(migrate.Mode(req.GetOptions().GetMode()), migrate.Direct), Result: migrate.Refused, Error: remote.Cause, Passes: []migrate.Pass{}}
	if err := printJSON(o.out, &r); err != nil {
		return err
	}
	return &silentError{exitRefused}
}

// follow shows a migration to its end. With signals, the first one cancels it.
func (o *options) follow(ctx context.Context, c *api.Client, id string, signals <-chan os.Signal) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	if signals != nil {
		defer o.cancelOnInterrupt(ctx, c, id, signals, stop)()
	}
	stream, err := c.Migrations.Watch(ctx, &lmctlv1.MigrationRequest{Id: id})
	if err != nil {
		return err
	}
	show := newProgress(o)
	for {
		m, err := stream.Recv()
		if err != nil {
			show.end()
			if errors.Is(err, context.Canceled) {
				return fmt.Errorf("left while migration %s is being cancelled; see lmctl migration show %s", id, id)
			}
			return fmt.Errorf("lost sight of migration %s: %w; lmctl migration show %s and lmctl guest list, on both hosts, tell what became of it", id, err, id)
		}
		show.update(m)
		if m.Finished {
			show.end()
			return o.finish(m)
		}
	}
}

// cancelOnInterrupt cancels the migration at the first Ctrl-C and leaves at the
// second. The returned function ends that.
func (o *options) cancelOnInterrupt(ctx context.Context, c *api.Client, id string, signals <-chan os.Signal, leave func()) func() {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for asked := false; ; asked = true {
			select {
			case <-ctx.Done():
				return
			case <-signals:
			}
			if asked {
				leave()
				return
			}
			fmt.Fprintln(o.err, "cancelling; the guest stays where it is. Once more to leave at once")
			if _, err := c.Migrations.Cancel(ctx, &lmctlv1.MigrationRequest{Id: id}); err != nil {
				fmt.Fprintf(o.err, "lmctl: cancel: %v\n", err)
			}
		}
	}()
	return func() { leave(); <-done }
}

// finish prints the account of a finished migration and returns how it ended.
func (o *options) finish(m *lmctlv1.Migration) error {
	var r migrate.Report
	if err := json.Unmarshal(m.Report, &r); err != nil {
		return fmt.Errorf("read the report of migration %s: %w", m.Id, err)
	}
	if o.json {
		if err := printJSON(o.out, &r); err != nil {
			return err
		}
		if r.Result == migrate.Completed {
			return nil
		}
		return &silentError{resultCode(r.Result)}
	}
	if r.Result != migrate.Completed {
		return &migrationError{r.Result, fmt.Sprintf("migrate %s to %s: %s: %s", r.Guest, r.Destination, r.Result, r.Error)}
	}
	return o.printReport(&r)
}
