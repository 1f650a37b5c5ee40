package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lmctl/lmctl/internal/pki"
)

func newPKICommand(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use: "pki", Short: "Make the certificates that hosts and operators prove themselves with",
		Args: noSuchCommand, RunE: showHelp,
	}
	cmd.AddCommand(newPKIInitCommand(o), newPKIIssueCommand(o), newPKIShowCommand(o))
	return cmd
}

func newPKIInitCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "init FOLDER", Short: "Make a certificate authority",
		Long: "Makes the key and the certificate of an authority in FOLDER. Keep the key off the hosts:\nwhoever has it can take part in every migration.",
		Args: takes("FOLDER"),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := pki.Init(args[0]); err != nil {
				return err
			}
			if o.json {
				return printJSON(o.out, map[string]string{"authority": args[0]})
			}
			_, err := fmt.Fprintf(o.out, "authority made in %s; next: lmctl pki issue --ca %s NAME\n", args[0], args[0])
			return err
		},
	}
}

func newPKIIssueCommand(o *options) *cobra.Command {
	var ca, out string
	var operator bool
	var names []string
	cmd := &cobra.Command{
		Use: "issue NAME", Short: "Issue a certificate to a host or an operator",
		Example: "  lmctl pki issue --ca ca --out host1-tls --san 192.0.2.1 host1\n  lmctl pki issue --ca ca --out ~/.config/lmctl --operator anna",
		Args:    takes("NAME"),
		RunE: func(_ *cobra.Command, args []string) error {
			role := pki.Host
			if operator {
				role = pki.Operator
			}
			if out == "" {
				out = args[0] + "-tls"
			}
			req := pki.Request{Role: role, Name: args[0], SANs: names}
			if err := pki.Issue(ca, req, out); err != nil {
				return err
			}
			if o.json {
				return printJSON(o.out, map[string]string{"name": args[0], "role": string(role), "folder": out})
			}
			_, err := fmt.Fprintf(o.out, "certificate for %s %s in %s: copy it there as root, and nowhere else\n", role, args[0], out)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&ca, "ca", "ca", "folder of the authority")
	f.StringVar(&out, "out", "", "folder to write to (NAME-tls)")
	f.BoolVar(&operator, "operator", false, "for a person or a program that gives orders, not a host")
	f.StringSliceVar(&names, "san", nil, "further DNS names or addresses of the host")
	return cmd
}

func newPKIShowCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "show PATH", Short: "Say what a certificate is for", Args: takes("PATH"),
		RunE: func(_ *cobra.Command, args []string) error {
			infos, err := pki.Show(args[0])
			if err != nil {
				return err
			}
			if o.json {
				return printJSON(o.out, infos)
			}
			var rows [][]string
			for _, i := range infos {
				until := i.NotAfter.Format(time.DateOnly)
				if i.Expired {
					until += " (expired)"
				}
				rows = append(rows, []string{i.Role, i.Name, until, strings.Join(append(i.DNS, i.Addresses...), ","), i.Fingerprint[:16]})
			}
			return printTable(o.out, "ROLE NAME VALID-UNTIL ALSO-KNOWN-AS FINGERPRINT", rows)
		},
	}
}
