// Package manpages makes lmctl's manual pages: section 1 from its commands,
// section 5 from the configuration file with its comments. Only the program
// that writes the pages links it (cmd/lmctl with the tag "man").
package manpages

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// Write writes one page for each command of root, and lmctl-agent.yaml(5) from
// the text of agent.yaml, into dir. The date is that of the pages.
func Write(dir string, root *cobra.Command, config []byte, version string, date time.Time) error {
	prepare(root)
	header := &doc.GenManHeader{Section: "1", Source: "lmctl " + version, Manual: "lmctl", Date: &date}
	if err := doc.GenManTree(root, header, dir); err != nil {
		return fmt.Errorf("write manual pages: %w", err)
	}
	if err := hangFlags(dir); err != nil {
		return fmt.Errorf("write manual pages: %w", err)
	}
	page, err := Config(config, version, date)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "lmctl-agent.yaml.5"), page, 0o644); err != nil {
		return fmt.Errorf("write manual pages: %w", err)
	}
	return nil
}

// prepare makes a command's texts, which are plain, into Markdown, and takes
// this machine out of its flags' defaults.
func prepare(cmd *cobra.Command) {
	cmd.DisableAutoGenTag = true
	if cmd.Long == "" {
		cmd.Long = cmd.Short + "."
	}
	cmd.Long = markdown(cmd.Long)
	if f := cmd.PersistentFlags().Lookup("tls-dir"); f != nil {
		f.DefValue = "~/.config/lmctl"
	}
	for _, c := range cmd.Commands() {
		prepare(c)
	}
}

// flagLine is how a flag comes out: a paragraph of its own, with a tab between
// the flag and what it does.
var flagLine = regexp.MustCompile(`(?m)^(?:\.PP\n)?(\\fB-.*)\n\t(.*)$`)

// hangFlags makes the flags of the pages in dir items of a list. One that is on
// or off needs no value.
func hangFlags(dir string) error {
	pages, err := filepath.Glob(filepath.Join(dir, "*.1"))
	if err != nil {
		return err
	}
	for _, path := range pages {
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		text = flagLine.ReplaceAll(text, []byte(".TP\n$1\n$2"))
		text = bytes.ReplaceAll(text, []byte("[=false]"), nil)
		if err := os.WriteFile(path, text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// markdown keeps lines that are indented as they are, and escapes what Markdown
// would take for its own.
func markdown(text string) string {
	var b strings.Builder
	var before string
	for line := range strings.Lines(text) {
		indented := strings.HasPrefix(line, "  ")
		if indented != strings.HasPrefix(before, "  ") && before != "" && strings.TrimSpace(before) != "" {
			b.WriteString("\n") // a block of its own
		}
		if indented {
			b.WriteString("    " + strings.TrimPrefix(line, "  "))
		} else {
			b.WriteString(escape.Replace(line))
		}
		before = line
	}
	return b.String()
}

var escape = strings.NewReplacer(`\`, `\\`, "*", `\*`, "_", `\_`, "<", `\<`, "[", `\[`)
