package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/lmctl/lmctl/internal/agent"
)

const agentLong = `Run this host's agent in the foreground: it keeps the host's guests, moves them to
other hosts and takes those of others.

Guests do not depend on it: they go on when it ends, and it adopts them when it
starts again. A first SIGTERM or SIGINT waits for migrations that are under way,
for as long as stop_timeout says, and then cancels them; a second one cancels
them at once. A cancelled migration leaves its guest running here.

Without a file at the default path every key has its default; --print-config
shows what is in force.`

func newAgentCommand(o *options) *cobra.Command {
	var path string
	var print bool
	cmd := &cobra.Command{
		Use: "agent", Short: "Run this host's agent", Long: agentLong,
		Example: "  lmctl agent --config /etc/lmctl/agent.yaml\n  lmctl agent --print-config > /etc/lmctl/agent.yaml",
		Args:    takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := agent.LoadConfig(path)
			if err != nil {
				return err
			}
			if print {
				return cfg.Print(o.out)
			}
			return runAgent(cmd.Context(), o, cfg)
		},
	}
	cmd.Flags().StringVar(&path, "config", agent.DefaultConfigPath, "configuration file")
	cmd.Flags().BoolVar(&print, "print-config", false, "print the configuration that is in force, with comments, and end")
	return cmd
}

func runAgent(ctx context.Context, o *options, cfg agent.Config) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	hurry, hurried := context.WithCancel(context.WithoutCancel(ctx))
	defer hurried()
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)
	go func() {
		for _, react := range []func(){stop, hurried} {
			select {
			case <-signals:
				react()
			case <-hurry.Done():
				return
			}
		}
	}()
	a, err := agent.New(ctx, cfg, buildVersion(), agent.NewLogger(cfg.Log, o.err))
	if err != nil {
		return err
	}
	return errors.Join(a.Run(ctx, hurry), a.Close())
}
