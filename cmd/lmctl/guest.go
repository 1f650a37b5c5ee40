package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
)

func newGuestCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use: "guest", Aliases: []string{"guests"}, Short: "The guests of a host",
		Args: noSuchCommand, RunE: showHelp,
	}
	cmd.AddCommand(
		newGuestDefineCommand(o), newGuestListCommand(o), newGuestShowCommand(o),
		newGuestStopCommand(o), newGuestClaimCommand(o), newGuestConsoleCommand(o),
		newGuestVerb(o, "start", "Start a guest", "", "started",
			func(c *api.Client) guestCall { return c.Guests.Start }),
		newGuestVerb(o, "destroy", "End a guest at once, as if its power had failed", "", "destroyed",
			func(c *api.Client) guestCall { return c.Guests.Destroy }),
		newGuestUndefineCommand(o),
	)
	return cmd
}

// newGuestVerb is a command that does one thing to one guest.
func newGuestVerb(o *options, verb, short, long, done string, call func(*api.Client) guestCall) *cobra.Command {
	return &cobra.Command{
		Use: verb + " NAME", Short: short, Long: cmp.Or(long, short+"."), Args: takes("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withAgent(func(c *api.Client) error {
				g, err := call(c)(cmd.Context(), &lmctlv1.GuestRequest{Name: args[0]})
				if err != nil {
					return err
				}
				return o.printDone(g, done)
			})
		},
	}
}

// printDone says in a line what was done to a guest.
func (o *options) printDone(g *lmctlv1.Guest, done string) error {
	if o.json {
		return printJSON(o.out, guestObject(g))
	}
	_, err := fmt.Fprintf(o.out, "guest %s %s on %s\n", g.Name, done, g.Host)
	return err
}

func newGuestDefineCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "define FILE", Short: "Define a guest from a YAML file (- for standard input)",
		Long: "Stores a guest's definition on the host. Start it with lmctl guest start.",
		Args: takes("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			text, err := o.readFile(args[0])
			if err != nil {
				return err
			}
			return o.withAgent(func(c *api.Client) error {
				g, err := c.Guests.Define(cmd.Context(), &lmctlv1.DefineRequest{Definition: text})
				if err != nil {
					return err
				}
				return o.printDone(g, "defined")
			})
		},
	}
}

// maxDefinition bounds what is read for a definition, in bytes.
const maxDefinition = 1 << 20

func (o *options) readFile(path string) ([]byte, error) {
	in := o.in
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxDefinition+1))
	if err == nil && len(b) > maxDefinition {
		err = fmt.Errorf("%s is larger than %s: this is no definition of a guest", path, size(maxDefinition))
	}
	return b, err
}

func newGuestUndefineCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "undefine NAME", Short: "Remove the definition of a stopped guest; its disks stay", Args: takes("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withAgent(func(c *api.Client) error {
				if _, err := c.Guests.Undefine(cmd.Context(), &lmctlv1.GuestRequest{Name: args[0]}); err != nil {
					return err
				}
				if o.json {
					return printJSON(o.out, map[string]string{"undefined": args[0]})
				}
				_, err := fmt.Fprintf(o.out, "guest %s undefined\n", args[0])
				return err
			})
		},
	}
}

func newGuestStopCommand(o *options) *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "stop NAME", Short: "Ask a guest to power down, and wait until it has", Args: takes("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &lmctlv1.StopRequest{Name: args[0]}
			if timeout > 0 {
				req.Timeout = durationpb.New(timeout)
			}
			return o.withAgent(func(c *api.Client) error {
				g, err := c.Guests.Stop(cmd.Context(), req)
				if err != nil {
					return err
				}
				return o.printDone(g, "stopped")
			})
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "how long the guest may take (the agent's default)")
	return cmd
}

func newGuestClaimCommand(o *options) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "claim NAME", Short: "Decide that a guest in doubt is this host's",
		Long: `A guest is in doubt when its migration was cut off at the one moment at which
it passes from one host to the other, and the two agents have not met since.
They settle it by themselves as soon as they can reach each other.

Claim it only if the other host is gone for good and certain not to run the
guest: two running copies destroy its disks. With --force this host is its owner
from now on, and the guest runs.`,
		Args: takes("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withAgent(func(c *api.Client) error {
				g, err := c.Guests.Claim(cmd.Context(), &lmctlv1.ClaimRequest{Name: args[0], Force: force})
				if err != nil {
					return err
				}
				return o.printDone(g, "claimed")
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "yes, the other host does not run it")
	return cmd
}
