package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/lmctl/lmctl/internal/lab"
)

const labLong = `A lab is a cluster on this one machine: each host is a network namespace with a
bridge, an agent and folders of its own, connected by a switch in another
namespace; beside them is a client. With --hypervisor libvirt each host also has
a libvirtd of its own, with its own /run, /etc/libvirt and so on. All of it is in
its namespaces and in one state folder: lab down leaves nothing.`

// labOptions are the flags that all lab commands have.
type labOptions struct {
	*options
	dir string
}

func newLabCommand(o *options) *cobra.Command {
	l := &labOptions{options: o}
	cmd := &cobra.Command{
		Use: "lab", Short: "A cluster on this machine, to try things out", Long: labLong,
		Example: "  lmctl lab up\n  lmctl lab guest start web --kind linux --host host1 --memory 512MiB\n" +
			"  lmctl lab exec host1 -- lmctl migrate web host2\n  lmctl lab guest check web\n  lmctl lab down",
		Args: noSuchCommand, RunE: showHelp,
	}
	dir := os.Getenv("LMCTL_LAB")
	if dir == "" {
		dir = lab.DefaultDir
	}
	cmd.PersistentFlags().StringVar(&l.dir, "state-dir", dir, "the lab's folder (or LMCTL_LAB)")
	cmd.AddCommand(newLabUpCommand(l), newLabDownCommand(l), newLabStatusCommand(l),
		newLabExecCommand(l), newLabGuestCommand(l), newLabCutCommand(l), newLabHealCommand(l), newLabDemoCommand(l))
	return cmd
}

// interruptible ends ctx on Ctrl-C, so that what was begun is cleaned up.
func interruptible(ctx context.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
}

// say tells what takes long, where it does not disturb the output.
func (l *labOptions) say(what string) { fmt.Fprintln(l.err, what) }

func newLabUpCommand(l *labOptions) *cobra.Command {
	opts := lab.Options{}
	var limit string
	cmd := &cobra.Command{
		Use: "up", Short: "Make a lab", Args: takes(),
		Long: "Makes a lab. What a crash has left of an earlier one in the same folder is removed first.\n" +
			"In a lab that is up already, it starts the agents (and libvirtd) that do not run.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			opts.Dir = l.dir
			if opts.Hosts < 1 || opts.Hosts > lab.MaxHosts {
				return usagef("--hosts %d: 1 to %d", opts.Hosts, lab.MaxHosts)
			}
			if limit != "" {
				n, err := parseSize(limit)
				if err != nil {
					return &usageError{fmt.Errorf("--memory-limit: %w", err)}
				}
				opts.MemoryLimit = n
			}
			ctx, stop := interruptible(cmd.Context())
			defer stop()
			made, err := lab.Up(ctx, opts)
			if errors.Is(err, lab.ErrUp) {
				made, err = l.revive(ctx, err)
			}
			if err != nil {
				return err
			}
			return l.printStatus(ctx, made)
		},
	}
	cmd.Flags().IntVar(&opts.Hosts, "hosts", 2, "how many hosts")
	cmd.Flags().StringVar(&limit, "memory-limit", "", "how much guest memory each host has, like 2GiB (default: half of this machine's)")
	addHypervisorFlag(cmd, &opts.Hypervisor)
	cmd.Flags().StringVar(&opts.Libvirt.User, "qemu-user", "", "with libvirt: whom QEMU runs as (default root)")
	cmd.Flags().BoolVar(&opts.Libvirt.Virtlogd, "virtlogd", false, "with libvirt: have a virtlogd carry what QEMU writes")
	cmd.Flags().StringSliceVar(&opts.AgentEnv, "agent-env", nil, "NAME=VALUE for the agents' environment; {host} stands for the host's name")
	return cmd
}

// addHypervisorFlag lets a lab's hypervisor be chosen.
func addHypervisorFlag(cmd *cobra.Command, h *lab.Hypervisor) {
	cmd.Flags().StringVar((*string)(h), "hypervisor", string(lab.QEMU), "what runs the guests: qemu, or libvirt")
}

// revive starts the dead daemons of a lab that is up. Where there are none, up is
// why there is nothing to do.
func (l *labOptions) revive(ctx context.Context, up error) (*lab.Lab, error) {
	open, err := lab.Open(l.dir)
	if err != nil {
		return nil, err
	}
	started, err := open.StartDead(ctx)
	for _, what := range started {
		l.say("the lab is up already; started " + what)
	}
	if err != nil {
		return nil, err
	}
	if len(started) == 0 {
		return nil, up
	}
	return open, nil
}

func newLabDownCommand(l *labOptions) *cobra.Command {
	return &cobra.Command{
		Use: "down", Short: "Remove the lab with all that runs in it", Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error { return lab.Down(cmd.Context(), l.dir) },
	}
}

func newLabStatusCommand(l *labOptions) *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show the lab's hosts and guests", Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			open, err := lab.Open(l.dir)
			if err != nil {
				return err
			}
			return l.printStatus(cmd.Context(), open)
		},
	}
}

func (l *labOptions) printStatus(ctx context.Context, open *lab.Lab) error {
	s, err := open.Status(ctx)
	if err != nil {
		return err
	}
	if l.json {
		return printJSON(l.out, s)
	}
	var rows [][]string
	var header string
	for _, h := range s.Hosts {
		row := []string{h.Name, h.Address, h.Namespace}
		header = "HOST ADDRESS NAMESPACE"
		for _, d := range h.Daemons {
			header += " " + strings.ToUpper(string(d.Name))
			state := "runs"
			if !d.Runs {
				state = "does not run: see " + d.Log
			}
			row = append(row, state)
		}
		rows = append(rows, row)
	}
	if err := printTable(l.out, header, rows); err != nil || len(s.Guests) == 0 {
		return err
	}
	rows = nil
	for _, g := range s.Guests {
		at := g.Host
		if g.Problem != "" {
			at = g.Problem
		}
		rows = append(rows, []string{g.Name, string(g.Kind), g.Address, at})
	}
	return printTable(l.out, "GUEST KIND ADDRESS HOST", rows)
}
