package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
)

func newHostCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use: "host", Aliases: []string{"hosts"}, Short: "The hosts", Args: noSuchCommand, RunE: showHelp,
	}
	cmd.AddCommand(newHostListCommand(o), newHostShowCommand(o), newHostCheckCommand(o))
	return cmd
}

func newHostListCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the hosts that the agent knows", Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.withAgent(func(c *api.Client) error {
				r, err := c.Hosts.List(cmd.Context(), &lmctlv1.ListHostsRequest{})
				if err != nil {
					return err
				}
				if o.json {
					return o.printProto(r)
				}
				var rows [][]string
				for _, h := range r.Hosts {
					rows = append(rows, hostRow(h))
				}
				return printTable(o.out, "NAME ADDRESS REACHABLE GUESTS MEMORY-FREE QEMU KERNEL", rows)
			})
		},
	}
}

func hostRow(h *lmctlv1.Host) []string {
	if !h.Reachable && !h.Self {
		return []string{h.Name, h.Address, "no: " + h.Problem, "", "", "", ""}
	}
	return []string{h.Name, h.Address, "yes", fmt.Sprintf("%d of %d running", h.GuestsRunning, h.Guests), size(h.MemoryAvailableBytes), h.HypervisorVersion, h.Kernel}
}

// printProto prints a message with the field names of the protocol.
func (o *options) printProto(m proto.Message) error {
	b, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true, Multiline: true}.Marshal(m)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(o.out, string(b))
	return err
}

func newHostShowCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "show [NAME]", Short: "Show a host, this one without a name", Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &lmctlv1.HostRequest{}
			if len(args) == 1 {
				req.Name = args[0]
			}
			return o.withAgent(func(c *api.Client) error {
				h, err := c.Hosts.Show(cmd.Context(), req)
				if err != nil {
					return err
				}
				if o.json {
					return o.printProto(h)
				}
				return o.printHost(h)
			})
		},
	}
}

func (o *options) printHost(h *lmctlv1.Host) error {
	kvm := "no"
	if h.Kvm {
		kvm = "yes"
	}
	reachable := "yes"
	var trip, expires string
	switch {
	case h.Self:
		reachable = "this host"
	case !h.Reachable:
		reachable = "no: " + h.Problem
	case h.RoundTrip != nil:
		trip = brief(h.RoundTrip.AsDuration())
	}
	if h.CertificateExpires != nil {
		expires = h.CertificateExpires.AsTime().Format(time.DateOnly)
	}
	return printFields(o.out,
		"Name", h.Name, "Address", h.Address, "Reachable", reachable, "Round trip", trip,
		"Agent", h.AgentVersion, "Kernel", h.Kernel, "QEMU", h.HypervisorVersion, "KVM", kvm,
		"CPUs", itoa(h.Cpus), "Memory", size(h.MemoryBytes), "Memory free", size(h.MemoryAvailableBytes),
		"Guests", fmt.Sprintf("%d, %d running", h.Guests, h.GuestsRunning), "Certificate until", expires)
}

func newHostCheckCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "check", Short: "Say whether this host can do the job",
		Long: "Tries what migrations need on this host: each line passes, or says what to do.\nIt ends with 1 if one of them fails.",
		Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.withAgent(func(c *api.Client) error {
				r, err := c.Hosts.Check(cmd.Context(), &lmctlv1.CheckRequest{})
				if err != nil {
					return err
				}
				return o.printCheck(r.Lines)
			})
		},
	}
}

type checkJSON struct {
	Name    string `json:"name"`
	Verdict string `json:"verdict"` // pass, warn or fail
	Detail  string `json:"detail"`
	Advice  string `json:"advice,omitempty"`
}

func (o *options) printCheck(lines []*lmctlv1.CheckLine) error {
	words := map[lmctlv1.CheckLine_Verdict]string{
		lmctlv1.CheckLine_VERDICT_PASS: "pass", lmctlv1.CheckLine_VERDICT_WARN: "warn", lmctlv1.CheckLine_VERDICT_FAIL: "fail",
	}
	failed := false
	list := make([]checkJSON, 0, len(lines))
	rows := make([][]string, 0, len(lines))
	for _, l := range lines {
		failed = failed || l.Verdict == lmctlv1.CheckLine_VERDICT_FAIL
		list = append(list, checkJSON{l.Name, words[l.Verdict], l.Detail, l.Advice})
		rows = append(rows, []string{words[l.Verdict], l.Name, l.Detail, l.Advice})
	}
	var err error
	if o.json {
		err = printJSON(o.out, list)
	} else {
		err = printTable(o.out, "VERDICT CHECK FOUND WHAT-TO-DO", rows)
	}
	if err == nil && failed {
		return &silentError{exitOther}
	}
	return err
}
