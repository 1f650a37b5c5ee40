package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
)

// guestCall is a call that does something to one guest.
type guestCall func(context.Context, *lmctlv1.GuestRequest, ...grpc.CallOption) (*lmctlv1.Guest, error)

// guestJSON is a guest as --json prints it. Its fields are stable.
type guestJSON struct {
	Name        string         `json:"name"`
	UUID        string         `json:"uuid"`
	Host        string         `json:"host"`
	State       string         `json:"state"`
	Runstate    string         `json:"runstate,omitempty"` // the hypervisor's own word
	Busy        string         `json:"busy,omitempty"`
	PID         int32          `json:"pid,omitempty"`
	MemoryBytes int64          `json:"memory_bytes"`
	VCPUs       int32          `json:"vcpus"`
	Machine     string         `json:"machine,omitempty"`
	Accelerator string         `json:"accelerator,omitempty"`
	Mode        string         `json:"mode,omitempty"`
	ModeReason  string         `json:"mode_reason,omitempty"`
	CPU         string         `json:"cpu,omitempty"`
	QEMU        string         `json:"qemu,omitempty"`
	Started     *time.Time     `json:"started,omitempty"`
	End         *endJSON       `json:"end,omitempty"`
	Ownership   *ownershipJSON `json:"ownership,omitempty"`
	Advice      string         `json:"advice,omitempty"`
	Migration   string         `json:"migration,omitempty"`
	Log         string         `json:"log,omitempty"`
	ConsoleLog  string         `json:"console_log,omitempty"`
	Observer    string         `json:"observer,omitempty"`
}

type endJSON struct {
	Cause  string     `json:"cause"`
	Signal int32      `json:"signal,omitempty"`
	Status int32      `json:"status,omitempty"`
	Detail string     `json:"detail,omitempty"`
	At     *time.Time `json:"at,omitempty"`
}

type ownershipJSON struct {
	State string `json:"state"`
	Epoch uint64 `json:"epoch"`
}

func guestObject(g *lmctlv1.Guest) guestJSON {
	out := guestJSON{
		Name: g.Name, UUID: g.Uuid, Host: g.Host, State: g.State, Runstate: g.Runstate, Busy: g.Busy, PID: g.Pid,
		MemoryBytes: g.MemoryBytes, VCPUs: g.Vcpus, Machine: g.Machine, Accelerator: g.Accelerator, Mode: g.Mode, ModeReason: g.ModeReason,
		CPU: g.Cpu, QEMU: g.HypervisorVersion, Advice: g.Advice, Migration: g.Migration,
		Log: g.LogPath, ConsoleLog: g.ConsoleLog, Observer: g.Observer,
	}
	if g.Started != nil {
		t := g.Started.AsTime()
		out.Started = &t
	}
	if e := g.End; e != nil {
		out.End = &endJSON{Cause: e.Cause, Signal: e.Signal, Status: e.Status, Detail: e.Detail}
		if e.At != nil {
			t := e.At.AsTime()
			out.End.At = &t
		}
	}
	if w := g.Ownership; w != nil && w.State != "" {
		out.Ownership = &ownershipJSON{State: w.State, Epoch: w.Epoch}
	}
	return out
}

func newGuestListCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the guests of a host", Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.withAgent(func(c *api.Client) error {
				r, err := c.Guests.List(cmd.Context(), &lmctlv1.ListGuestsRequest{})
				if err != nil {
					return err
				}
				return o.printGuests(r.Guests)
			})
		},
	}
}

func (o *options) printGuests(guests []*lmctlv1.Guest) error {
	if o.json {
		list := make([]guestJSON, 0, len(guests))
		for _, g := range guests {
			list = append(list, guestObject(g))
		}
		return printJSON(o.out, list)
	}
	var rows [][]string
	for _, g := range guests {
		rows = append(rows, []string{g.Name, g.State, size(g.MemoryBytes), itoa(g.Vcpus), g.Accelerator, g.Mode, endWords(g.End, g.State)})
	}
	if err := printTable(o.out, "NAME STATE MEMORY VCPUS ACCELERATOR MODE LAST-END", rows); err != nil {
		return err
	}
	for _, g := range guests {
		if g.Advice != "" {
			if _, err := fmt.Fprintf(o.out, "\n%s: %s\n", g.Name, g.Advice); err != nil {
				return err
			}
		}
	}
	return nil
}

// endWords says how a guest that does not run has ended.
func endWords(e *lmctlv1.End, state string) string {
	if e == nil || e.Cause == "" || state == "running" {
		return ""
	}
	words := e.Cause
	switch {
	case e.Signal != 0:
		words += fmt.Sprintf(" (signal %d)", e.Signal)
	case e.Status != 0:
		words += fmt.Sprintf(" (status %d)", e.Status)
	}
	return words
}

// modeWords says how a guest would migrate, and why.
func modeWords(mode, reason string) string {
	switch {
	case mode == "" && reason == "":
		return ""
	case mode == "":
		return "not: " + reason
	}
	return mode + ": " + reason
}

func newGuestShowCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "show NAME", Short: "Show all that is known of a guest", Args: takes("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withAgent(func(c *api.Client) error {
				g, err := c.Guests.Show(cmd.Context(), &lmctlv1.GuestRequest{Name: args[0]})
				if err != nil {
					return err
				}
				if o.json {
					return printJSON(o.out, guestObject(g))
				}
				return o.printGuest(g)
			})
		},
	}
}

func (o *options) printGuest(g *lmctlv1.Guest) error {
	v := guestObject(g)
	var started, epoch, pid string
	if v.Started != nil {
		started = v.Started.Local().Format(time.DateTime)
	}
	if v.Ownership != nil {
		epoch = fmt.Sprintf("%s, epoch %d", v.Ownership.State, v.Ownership.Epoch)
	}
	if v.PID != 0 {
		pid = itoa(v.PID)
	}
	end := endWords(g.End, g.State)
	if v.End != nil && v.End.Detail != "" && end != "" {
		end += ": " + v.End.Detail
	}
	return printFields(o.out,
		"Name", v.Name, "UUID", v.UUID, "Host", v.Host, "State", stateWords(v.State, v.Runstate), "In doubt", v.Advice, "Busy with", v.Busy,
		"Memory", size(v.MemoryBytes), "vCPUs", itoa(v.VCPUs), "CPU", v.CPU, "Machine", v.Machine,
		"Accelerator", v.Accelerator, "Migrates", modeWords(v.Mode, v.ModeReason), "QEMU", v.QEMU, "Process", pid, "Started", started, "Last end", end,
		"Ownership", epoch, "Migration", v.Migration, "Log", v.Log, "Console log", v.ConsoleLog, "Observer", v.Observer)
}

// stateWords is a guest's state, with what its hypervisor adds to that.
func stateWords(state, runstate string) string {
	switch {
	case runstate == "" || runstate == state:
		return state
	case strings.HasPrefix(runstate, state+" "):
		return runstate
	}
	return state + " (" + runstate + ")"
}
