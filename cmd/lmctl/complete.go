package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/hypervisor"
)

// completeTimeout is how long somebody who pressed TAB waits for the agent. One
// that does not answer offers nothing.
const completeTimeout = time.Second

// candidates are the names that an argument can be, each with a word about it.
type candidates func(context.Context, *api.Client) ([]cobra.Completion, error)

// completions are what the arguments of commands are, by the command's path.
// Commands that are not here take no names of the agent's.
var completions = map[string][]candidates{
	"lmctl guest show":       {guests()},
	"lmctl guest claim":      {guests(stateInDoubt)},
	"lmctl guest console":    {guests(running...)},
	"lmctl guest destroy":    {guests(running...)},
	"lmctl guest start":      {guests(string(hypervisor.StateStopped))},
	"lmctl guest stop":       {guests(string(hypervisor.StateRunning))},
	"lmctl guest undefine":   {guests(string(hypervisor.StateStopped))},
	"lmctl host show":        {hosts(true)},
	"lmctl migrate":          {guests(string(hypervisor.StateRunning), string(hypervisor.StatePaused)), hosts(false)},
	"lmctl migration show":   {migrations(true)},
	"lmctl migration watch":  {migrations(false)},
	"lmctl migration cancel": {migrations(false)},
}

// stateInDoubt is the state of a guest whose owner is not settled, which the
// agent has besides the hypervisor's.
const stateInDoubt = "in-doubt"

// What names a file or a folder is completed by the shell itself.
var (
	fileFlags   = []string{"config", "disk", "qemu"}
	folderFlags = []string{"tls-dir", "state-dir", "ca", "firmware-dir", "dir"}
	pathArgs    = map[string]cobra.ShellCompDirective{
		"lmctl guest define": cobra.ShellCompDirectiveDefault,
		"lmctl pki show":     cobra.ShellCompDirectiveDefault,
		"lmctl pki init":     cobra.ShellCompDirectiveFilterDirs,
		"lmctl lab exec":     cobra.ShellCompDirectiveDefault,
	}
)

var running = []string{
	string(hypervisor.StateRunning), string(hypervisor.StatePaused), string(hypervisor.StateStarting), string(hypervisor.StateMigrating),
}

// addCompletions has the shell complete names from the agent, paths from the
// disk, and nothing where neither would do.
func (o *options) addCompletions(cmd *cobra.Command) {
	if !cmd.HasParent() {
		cmd.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	}
	if of, found := completions[cmd.CommandPath()]; found {
		cmd.ValidArgsFunction = o.complete(of...)
	}
	if directive, found := pathArgs[cmd.CommandPath()]; found {
		cmd.ValidArgsFunction = fromDisk(directive)
	}
	completeFlags(cmd, fileFlags, fromDisk(cobra.ShellCompDirectiveDefault))
	completeFlags(cmd, folderFlags, fromDisk(cobra.ShellCompDirectiveFilterDirs))
	if cmd.CommandPath() == "lmctl migration list" {
		completeFlags(cmd, []string{"guest"}, func(cmd *cobra.Command, _ []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return o.complete(guests())(cmd, nil, typed)
		})
	}
	for _, c := range cmd.Commands() {
		o.addCompletions(c)
	}
}

// completeFlags says how those of the flags that the command itself has are
// completed.
func completeFlags(cmd *cobra.Command, names []string, with cobra.CompletionFunc) {
	for _, name := range names {
		if cmd.LocalFlags().Lookup(name) == nil {
			continue
		}
		if err := cmd.RegisterFlagCompletionFunc(name, with); err != nil {
			panic(err) // the flag is there, and nobody else completes it
		}
	}
}

func fromDisk(directive cobra.ShellCompDirective) cobra.CompletionFunc {
	return func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return nil, directive
	}
}

// complete offers the n-th of the candidates for the n-th argument.
func (o *options) complete(of ...candidates) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) >= len(of) {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), completeTimeout)
		defer cancel()
		var names []cobra.Completion
		err := o.withAgent(func(c *api.Client) (err error) {
			names, err = of[len(args)](ctx, c)
			return err
		})
		if err != nil {
			// Nobody reads an error in the middle of a line that is being typed.
			cobra.CompDebugln(err.Error(), false)
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		names = slices.DeleteFunc(names, func(name string) bool { return !strings.HasPrefix(name, typed) })
		return names, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
	}
}

// guests are those in one of the states, or all.
func guests(states ...string) candidates {
	return func(ctx context.Context, c *api.Client) ([]cobra.Completion, error) {
		r, err := c.Guests.List(ctx, &lmctlv1.ListGuestsRequest{})
		if err != nil {
			return nil, err
		}
		var names []cobra.Completion
		for _, g := range r.Guests {
			if len(states) == 0 || slices.Contains(states, g.State) {
				names = append(names, cobra.CompletionWithDesc(g.Name, g.State))
			}
		}
		return names, nil
	}
}

// hosts are those that the agent knows, with or without its own.
func hosts(own bool) candidates {
	return func(ctx context.Context, c *api.Client) ([]cobra.Completion, error) {
		r, err := c.Hosts.List(ctx, &lmctlv1.ListHostsRequest{Brief: true})
		if err != nil {
			return nil, err
		}
		var names []cobra.Completion
		for _, h := range r.Hosts {
			switch {
			case !h.Self:
				names = append(names, cobra.CompletionWithDesc(h.Name, h.Address))
			case own:
				names = append(names, cobra.CompletionWithDesc(h.Name, "this host"))
			}
		}
		return names, nil
	}
}

// migrations are those under way, or all, the newest first.
func migrations(ended bool) candidates {
	return func(ctx context.Context, c *api.Client) ([]cobra.Completion, error) {
		r, err := c.Migrations.List(ctx, &lmctlv1.ListMigrationsRequest{})
		if err != nil {
			return nil, err
		}
		var ids []cobra.Completion
		for _, m := range r.Migrations {
			if ended || !m.Finished {
				ids = append(ids, cobra.CompletionWithDesc(m.Id, m.Guest+" to "+m.Destination+", "+m.State))
			}
		}
		return ids, nil
	}
}
