package main

import (
	"github.com/spf13/cobra"

	"github.com/lmctl/lmctl/internal/lab"
)

func newLabExecCommand(l *labOptions) *cobra.Command {
	return &cobra.Command{
		Use: "exec HOST -- COMMAND [ARGUMENT]...", Short: "Run a command on a host of the lab, or on its client",
		Long: `Runs a command in the network namespace of a host, or of the client. There, lmctl
is this program and talks to that host's agent, and virsh to its libvirt, where it
has one. The exit code is the command's.`,
		Example: "  lmctl lab exec host1 -- lmctl guest list\n  lmctl lab exec client -- ping 10.77.0.1\n  lmctl lab exec host2 -- virsh list",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usagef("usage: %s", cmd.UseLine())
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			open, err := lab.Open(l.dir)
			if err != nil {
				return err
			}
			return open.Exec(args[0], args[1:])
		},
	}
}

func newLabCutCommand(l *labOptions) *cobra.Command {
	return newLabLinkCommand(l, "cut", "Take a host off the network, as if its cable were pulled", (*lab.Lab).Cut)
}

func newLabHealCommand(l *labOptions) *cobra.Command {
	return newLabLinkCommand(l, "heal", "Put a host back on the network", (*lab.Lab).Heal)
}

func newLabLinkCommand(l *labOptions, verb, short string, do func(*lab.Lab, string) error) *cobra.Command {
	return &cobra.Command{
		Use: verb + " HOST", Short: short, Args: takes("HOST"),
		RunE: func(_ *cobra.Command, args []string) error {
			open, err := lab.Open(l.dir)
			if err != nil {
				return err
			}
			return do(open, args[0])
		},
	}
}
