package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

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
					list := make([]hostJSON, 0, len(r.Hosts))
					for _, h := range r.Hosts {
						list = append(list, hostObject(h))
					}
					return printJSON(o.out, list)
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

// hostJSON is a host as --json prints it. Its fields are stable.
type hostJSON struct {
	Name                 string     `json:"name"`
	Address              string     `json:"address,omitempty"`
	Self                 bool       `json:"self"` // it is the one that was asked
	Reachable            bool       `json:"reachable"`
	Problem              string     `json:"problem,omitempty"` // why it is not
	AgentVersion         string     `json:"agent_version,omitempty"`
	Kernel               string     `json:"kernel,omitempty"`
	Hypervisor           string     `json:"hypervisor,omitempty"`
	HypervisorVersion    string     `json:"hypervisor_version,omitempty"`
	KVM                  bool       `json:"kvm"`
	CPUs                 int32      `json:"cpus"`
	MemoryBytes          int64      `json:"memory_bytes"`
	MemoryAvailableBytes int64      `json:"memory_available_bytes"`
	Guests               int32      `json:"guests"`
	GuestsRunning        int32      `json:"guests_running"`
	Time                 *time.Time `json:"time,omitempty"` // by its clock
	CertificateExpires   *time.Time `json:"certificate_expires,omitempty"`
	RoundTripNS          int64      `json:"round_trip_ns"` // 0 of the one that was asked
}

func hostObject(h *lmctlv1.Host) hostJSON {
	out := hostJSON{
		Name: h.Name, Address: h.Address, Self: h.Self, Reachable: h.Reachable, Problem: h.Problem,
		AgentVersion: h.AgentVersion, Kernel: h.Kernel, Hypervisor: h.Hypervisor, HypervisorVersion: h.HypervisorVersion,
		KVM: h.Kvm, CPUs: h.Cpus, MemoryBytes: h.MemoryBytes, MemoryAvailableBytes: h.MemoryAvailableBytes,
		Guests: h.Guests, GuestsRunning: h.GuestsRunning, RoundTripNS: int64(h.RoundTrip.AsDuration()),
	}
	if h.Time != nil {
		t := h.Time.AsTime()
		out.Time = &t
	}
	if h.CertificateExpires != nil {
		t := h.CertificateExpires.AsTime()
		out.CertificateExpires = &t
	}
	return out
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
					return printJSON(o.out, hostObject(h))
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

// verdictWords are the verdicts as they are printed.
var verdictWords = map[lmctlv1.CheckLine_Verdict]string{
	lmctlv1.CheckLine_VERDICT_PASS: "pass", lmctlv1.CheckLine_VERDICT_WARN: "warn", lmctlv1.CheckLine_VERDICT_FAIL: "fail",
}

func checkObjects(lines []*lmctlv1.CheckLine) []checkJSON {
	list := make([]checkJSON, 0, len(lines))
	for _, l := range lines {
		list = append(list, checkJSON{l.Name, verdictWords[l.Verdict], l.Detail, l.Advice})
	}
	return list
}

func (o *options) printCheck(lines []*lmctlv1.CheckLine) error {
	failed := false
	rows := make([][]string, 0, len(lines))
	for _, l := range lines {
		failed = failed || l.Verdict == lmctlv1.CheckLine_VERDICT_FAIL
		rows = append(rows, []string{verdictWords[l.Verdict], l.Name, l.Detail, l.Advice})
	}
	var err error
	if o.json {
		err = printJSON(o.out, checkObjects(lines))
	} else {
		err = printTable(o.out, "VERDICT CHECK FOUND WHAT-TO-DO", rows)
	}
	if err == nil && failed {
		return &silentError{exitOther}
	}
	return err
}
