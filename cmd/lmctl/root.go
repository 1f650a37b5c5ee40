package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/pki"
)

// streams are a command's standard streams.
type streams struct {
	in  io.Reader
	out io.Writer
	err io.Writer
}

// options are the flags that every command has.
type options struct {
	streams
	agent  string
	tlsDir string
	json   bool
}

const defaultSocket = "/run/lmctl/agent.sock"

const rootLong = `lmctl moves running KVM guests between hosts, with a pause of milliseconds and no
dropped connection.

Every host runs an agent (lmctl agent). The other commands talk to this host's
agent through its socket, as root, or to another host's with --agent, with a
certificate made by lmctl pki.

Exit codes:
  0  done
  1  anything not listed here
  2  the command line is wrong
  3  refused before anything was copied; the guest runs on where it was
  4  failed or cancelled; the guest runs on the source
  5  in doubt: the guest stands still until both hosts have settled who owns it`

func newRootCommand(s streams) (*cobra.Command, *options) {
	o := &options{streams: s}
	root := &cobra.Command{
		Use: "lmctl", Short: "Live migration and failover for KVM guests", Long: rootLong,
		SilenceErrors: true, SilenceUsage: true, Args: noSuchCommand, RunE: showHelp,
	}
	root.SetIn(s.in)
	root.SetOut(s.out)
	root.SetErr(s.err)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	f := root.PersistentFlags()
	agent := os.Getenv("LMCTL_AGENT")
	if agent == "" {
		agent = defaultSocket
	}
	f.StringVar(&o.agent, "agent", agent, "agent to talk to: a socket's path, host:port or NAME@host:port (or LMCTL_AGENT)")
	f.StringVar(&o.tlsDir, "tls-dir", defaultTLSDir(), "folder with your certificate, for an agent over the network (or LMCTL_TLS)")
	f.BoolVar(&o.json, "json", false, "print JSON")
	root.AddCommand(
		newAgentCommand(o), newGuestCommand(o), newHostCommand(o), newMigrateCommand(o),
		newMigrationCommand(o), newPKICommand(o), newVersionCommand(o), newLabCommand(o), newBenchCommand(o),
	)
	o.addCompletions(root)
	return root, o
}

func defaultTLSDir() string {
	if dir := os.Getenv("LMCTL_TLS"); dir != "" {
		return dir
	}
	if dir, err := os.UserConfigDir(); err == nil {
		return filepath.Join(dir, "lmctl")
	}
	return "/etc/lmctl/tls"
}

// run is the program: it returns the exit code.
func run(ctx context.Context, args []string, s streams) int {
	root, o := newRootCommand(s)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	code := exitCode(err)
	var silent *silentError
	if !errors.As(err, &silent) {
		printError(o, err, code)
	}
	return code
}

// dial opens the agent that the flags name.
func (o *options) dial() (*api.Client, error) {
	if strings.HasPrefix(o.agent, "/") {
		return api.Dial(api.Target{Socket: o.agent})
	}
	host, address, err := api.ParseAgent(o.agent)
	if err != nil {
		return nil, &usageError{err}
	}
	id, err := pki.Load(pki.FilesIn(o.tlsDir))
	if err != nil {
		return nil, fmt.Errorf("%w; an agent on the network asks for a certificate: make one with lmctl pki issue, and name its folder with --tls-dir", err)
	}
	return api.Dial(api.Target{Address: address, Host: host, Identity: id})
}

// withAgent runs fn with a client of the agent.
func (o *options) withAgent(fn func(*api.Client) error) error {
	c, err := o.dial()
	if err != nil {
		return err
	}
	return errors.Join(fn(c), c.Close())
}

// showHelp is what a command does that only has others beneath it.
func showHelp(cmd *cobra.Command, _ []string) error { return cmd.Help() }

// noSuchCommand refuses arguments where a command's name was expected.
func noSuchCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return usagef("%s has no command %q; see %s --help", cmd.CommandPath(), args[0], cmd.CommandPath())
}

// takes checks the number of arguments; names are what they are.
func takes(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == len(names) {
			return nil
		}
		return usagef("usage: %s; see %s --help", cmd.UseLine(), cmd.CommandPath())
	}
}
