package main

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/migrate"
)

func newMigrationCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use: "migration", Aliases: []string{"migrations"}, Short: "Migrations under way and past",
		Args: noSuchCommand, RunE: showHelp,
	}
	cmd.AddCommand(newMigrationListCommand(o), newMigrationShowCommand(o), newMigrationCancelCommand(o), newMigrationWatchCommand(o))
	return cmd
}

// migrationJSON is a migration as --json prints it. Its fields are stable.
type migrationJSON struct {
	ID          string          `json:"id"`
	Guest       string          `json:"guest"`
	Source      string          `json:"source"`
	Destination string          `json:"destination"`
	State       string          `json:"state"`
	Finished    bool            `json:"finished"`
	Started     time.Time       `json:"started"`
	Ended       *time.Time      `json:"ended,omitempty"`
	Report      json.RawMessage `json:"report,omitempty"`
}

func migrationObject(m *lmctlv1.Migration) migrationJSON {
	out := migrationJSON{
		ID: m.Id, Guest: m.Guest, Source: m.Source, Destination: m.Destination, State: m.State,
		Finished: m.Finished, Started: m.Started.AsTime(), Report: m.Report,
	}
	if m.Ended != nil {
		t := m.Ended.AsTime()
		out.Ended = &t
	}
	return out
}

func newMigrationListCommand(o *options) *cobra.Command {
	var guest string
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List migrations away from this host, the newest first", Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.withAgent(func(c *api.Client) error {
				r, err := c.Migrations.List(cmd.Context(), &lmctlv1.ListMigrationsRequest{Guest: guest})
				if err != nil {
					return err
				}
				return o.printMigrations(r.Migrations)
			})
		},
	}
	cmd.Flags().StringVar(&guest, "guest", "", "only those of this guest")
	return cmd
}

func (o *options) printMigrations(list []*lmctlv1.Migration) error {
	if o.json {
		out := make([]migrationJSON, 0, len(list))
		for _, m := range list {
			out = append(out, migrationObject(m))
		}
		return printJSON(o.out, out)
	}
	var rows [][]string
	for _, m := range list {
		state, downtime, total := m.State, "", ""
		if m.Finished {
			var r migrate.Report
			if err := json.Unmarshal(m.Report, &r); err != nil {
				return fmt.Errorf("read the report of migration %s: %w", m.Id, err)
			}
			state, total = string(r.Result), brief(r.Total)
			if r.Downtime > 0 {
				downtime = brief(r.Downtime)
			}
		}
		rows = append(rows, []string{m.Id, m.Guest, m.Destination, state, downtime, total, m.Started.AsTime().Local().Format(time.DateTime)})
	}
	return printTable(o.out, "ID GUEST DESTINATION STATE DOWNTIME TOTAL STARTED", rows)
}

func newMigrationShowCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "show ID", Short: "Show a migration", Args: takes("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withAgent(func(c *api.Client) error {
				m, err := c.Migrations.Show(cmd.Context(), &lmctlv1.MigrationRequest{Id: args[0]})
				if err != nil {
					return err
				}
				if o.json {
					return printJSON(o.out, migrationObject(m))
				}
				return o.printMigration(m)
			})
		},
	}
}

func (o *options) printMigration(m *lmctlv1.Migration) error {
	if m.Progress != nil {
		for _, p := range m.Progress.Passes {
			fmt.Fprintln(o.out, passLine(p))
		}
	}
	if !m.Finished {
		return printFields(o.out, "Guest", m.Guest, "Destination", m.Destination, "State", m.State)
	}
	var r migrate.Report
	if err := json.Unmarshal(m.Report, &r); err != nil {
		return fmt.Errorf("read the report of migration %s: %w", m.Id, err)
	}
	if r.Result == migrate.Completed {
		return o.printReport(&r)
	}
	return printFields(o.out, "Guest", r.Guest, "Destination", r.Destination, "Result", string(r.Result), "Because", r.Error)
}

func newMigrationCancelCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "cancel ID", Short: "Cancel a migration; the guest stays on the source", Args: takes("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withAgent(func(c *api.Client) error {
				m, err := c.Migrations.Cancel(cmd.Context(), &lmctlv1.MigrationRequest{Id: args[0]})
				if err != nil {
					return err
				}
				if o.json {
					return printJSON(o.out, migrationObject(m))
				}
				_, err = fmt.Fprintf(o.out, "migration %s of %s is being cancelled\n", m.Id, m.Guest)
				return err
			})
		},
	}
}

func newMigrationWatchCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "watch ID", Short: "Watch a migration to its end, as lmctl migrate does", Args: takes("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withAgent(func(c *api.Client) error { return o.follow(cmd.Context(), c, args[0], nil) })
		},
	}
}
