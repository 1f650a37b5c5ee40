package manpages

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/cpuguy83/go-md2man/v2/md2man"
)

// What the lines of agent.yaml are, in this order: text of a comment, a key, a
// key in a mapping, and why that one is there.
var (
	commentLine = regexp.MustCompile(`^#(?: (.*)|)$`)
	keyLine     = regexp.MustCompile(`^#([a-z_]+):(?: (.*))?$`)
	innerKey    = regexp.MustCompile(`^#  ([a-z_]+): (.*)$`)
	innerWhy    = regexp.MustCompile(`^#  # (.*)$`)
)

// Config makes lmctl-agent.yaml(5) from agent.yaml: paragraphs, each a comment
// and below it the keys that it explains, commented out, with their defaults.
func Config(text []byte, version string, date time.Time) ([]byte, error) {
	var intro, keys strings.Builder
	for i, block := range strings.Split(strings.TrimSpace(string(text)), "\n\n") {
		p, err := parse(block)
		switch {
		case err != nil:
			return nil, fmt.Errorf("agent.yaml, paragraph %d: %w", i+1, err)
		case i == 0:
			// The title of the file, not of the page.
		case len(p.keys) == 0:
			intro.WriteString(markdown(p.text) + "\n")
		default:
			p.write(&keys)
		}
	}
	if keys.Len() == 0 {
		return nil, errors.New("agent.yaml shows no keys")
	}
	page := fmt.Sprintf(`%% "LMCTL-AGENT.YAML" "5" "%s" "lmctl %s" "lmctl"
# NAME
lmctl-agent.yaml \- configuration of a host's lmctl agent

# SYNOPSIS
/etc/lmctl/agent.yaml

# DESCRIPTION
%s
# KEYS
%s
# SEE ALSO
**lmctl(1)**, **lmctl-agent(1)**, **lmctl-pki-issue(1)**
`, date.UTC().Format("Jan 2006"), version, intro.String(), keys.String())
	return md2man.Render([]byte(page)), nil
}

// paragraph is a comment with the keys that follow it.
type paragraph struct {
	text string
	keys []key
}

// key is a setting with its default. One of a mapping may have a text of its
// own.
type key struct{ name, value, text string }

func parse(block string) (paragraph, error) {
	var p paragraph
	var text, why []string
	outer := ""
	for line := range strings.SplitSeq(block, "\n") {
		if m := innerWhy.FindStringSubmatch(line); m != nil && outer != "" {
			why = append(why, m[1])
		} else if m := innerKey.FindStringSubmatch(line); m != nil && outer != "" {
			if len(why) == 0 {
				return p, fmt.Errorf("nothing is said of %s.%s", outer, m[1])
			}
			p.keys = append(p.keys, key{outer + "." + m[1], m[2], strings.Join(why, "\n")})
			why = nil
		} else if m := keyLine.FindStringSubmatch(line); m != nil {
			outer = m[1]
			if m[2] != "" {
				p.keys = append(p.keys, key{name: m[1], value: m[2]})
			}
		} else if m := commentLine.FindStringSubmatch(line); m != nil && outer == "" {
			text = append(text, m[1])
		} else {
			return p, fmt.Errorf("%q is neither a comment nor a key that is commented out", line)
		}
	}
	p.text = strings.Join(text, "\n") + "\n"
	return p, nil
}

// write lists the paragraph's keys. Those of a mapping are below the text that
// they have in common.
func (p paragraph) write(b *strings.Builder) {
	outer, _, mapping := strings.Cut(p.keys[0].name, ".")
	if mapping {
		fmt.Fprintf(b, "**%s**\n: %s\n\n", escape.Replace(outer), oneParagraph(p.text))
	}
	for _, k := range p.keys {
		fmt.Fprintf(b, "**%s: %s**\n", escape.Replace(k.name), escape.Replace(k.value))
		text := k.text
		if !mapping {
			text = p.text
		}
		fmt.Fprintf(b, ": %s\n\n", oneParagraph(text))
	}
}

// oneParagraph is markdown that goes on in the item that it is put into.
func oneParagraph(text string) string {
	return strings.ReplaceAll(strings.TrimSpace(markdown(text)), "\n", "\n    ")
}
