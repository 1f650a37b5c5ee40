package main

import (
	"context"
	"fmt"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
)

// verdictJSON is a dry run as --json prints it. Its fields are stable.
type verdictJSON struct {
	Guest             string      `json:"guest"`
	Destination       string      `json:"destination"`
	OK                bool        `json:"ok"`   // the migration would begin
	Mode              string      `json:"mode"` // in which; empty if in none
	ModeReason        string      `json:"mode_reason"`
	SourceChecks      []checkJSON `json:"source_checks"`
	DestinationChecks []checkJSON `json:"destination_checks"` // empty if it was not asked
}

// dryRun says what a migration would meet, and does nothing.
func (o *options) dryRun(ctx context.Context, c *api.Client, req *lmctlv1.StartMigrationRequest) error {
	v, err := c.Migrations.Check(ctx, req)
	if err != nil {
		return err
	}
	if o.json {
		err = printJSON(o.out, verdictJSON{req.Guest, req.Destination, v.Ok, v.Mode, v.ModeReason, checkObjects(v.Source), checkObjects(v.Destination)})
	} else {
		err = o.printVerdict(req, v)
	}
	if err == nil && !v.Ok {
		return &silentError{exitRefused}
	}
	return err
}

func (o *options) printVerdict(req *lmctlv1.StartMigrationRequest, v *lmctlv1.MigrationVerdict) error {
	var rows [][]string
	add := func(host string, lines []*lmctlv1.CheckLine) {
		for _, l := range lines {
			text := l.Name + ": " + l.Detail
			if l.Advice != "" {
				text += "; " + l.Advice
			}
			rows = append(rows, []string{host, verdictWords[l.Verdict], text})
		}
	}
	add("source", v.Source)
	add("destination", v.Destination)
	if err := printTable(o.out, "HOST VERDICT FOUND", rows); err != nil {
		return err
	}
	words := fmt.Sprintf("guest %s can move to %s, in mode %s: %s", req.Guest, req.Destination, v.Mode, v.ModeReason)
	if !v.Ok {
		words = fmt.Sprintf("guest %s cannot move to %s: see the lines that fail", req.Guest, req.Destination)
	}
	_, err := fmt.Fprintf(o.out, "\n%s\n", words)
	return err
}
