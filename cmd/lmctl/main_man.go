//go:build man

// With the tag "man" this program writes the manual pages of lmctl instead, so
// that lmctl itself carries nothing that only they need:
//
//	go run -tags man ./cmd/lmctl FOLDER
package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/lmctl/lmctl/packaging/manpages"
)

func main() {
	if err := writeManual(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "lmctl manual: %v\n", err)
		os.Exit(1)
	}
}

func writeManual(args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("%d arguments: want the folder to write to", len(args))
	}
	// The defaults that the pages show are not this environment's.
	for _, name := range []string{"LMCTL_AGENT", "LMCTL_TLS"} {
		if err := os.Unsetenv(name); err != nil {
			return err
		}
	}
	date := time.Now()
	if text := os.Getenv("SOURCE_DATE_EPOCH"); text != "" {
		seconds, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
		}
		date = time.Unix(seconds, 0)
	}
	config, err := os.ReadFile("packaging/agent.yaml")
	if err != nil {
		return err
	}
	root, _ := newRootCommand(streams{in: os.Stdin, out: io.Discard, err: io.Discard})
	root.InitDefaultCompletionCmd()
	return manpages.Write(args[0], root, config, buildVersion(), date.UTC())
}
