package main

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
)

// complete is what the shell is told when TAB is pressed after the last of args:
// the names, and whether it may offer files.
func complete(t *testing.T, args ...string) (names []string, files bool) {
	t.Helper()
	code, out, _ := lmctl(t, append([]string{cobra.ShellCompNoDescRequestCmd}, args...)...)
	if code != 0 {
		t.Errorf("complete %q: exit code %d", args, code)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	last := lines[len(lines)-1]
	if !strings.HasPrefix(last, ":") {
		t.Fatalf("complete %q: no directive in %q", args, out)
	}
	return lines[:len(lines)-1], last == ":0" || last == ":16"
}

func TestCompleteNames(t *testing.T) {
	f := &fakeAgent{
		guests: []*lmctlv1.Guest{
			{Name: "web", State: "running"}, {Name: "work", State: "paused"}, {Name: "old", State: "stopped"}, {Name: "lost", State: "in-doubt"},
		},
		moves: []*lmctlv1.Migration{{Id: "m2", Guest: "web", Destination: "host2"}, {Id: "m1", Guest: "web", Destination: "host2", Finished: true}},
	}
	socket := f.serve(t)
	for _, c := range []struct{ line, want string }{
		{"guest show ", "web work old lost"},
		{"guest show w", "web work"},
		{"guest show x", ""},
		{"guest show web ", ""},
		{"guests show l", "lost"},
		{"guest start ", "old"},
		{"guest stop ", "web"},
		{"guest destroy ", "web work"},
		{"guest console ", "web work"},
		{"guest undefine ", "old"},
		{"guest claim ", "lost"},
		{"migrate ", "web work"},
		{"migrate web ", "host2 other"},
		{"migrate web o", "other"},
		{"migrate web host2 ", ""},
		{"host show ", "host1 host2 other"},
		{"migration show ", "m2 m1"},
		{"migration watch ", "m2"},
		{"migration cancel ", "m2"},
		{"migration list --guest l", "lost"},
		{"version ", ""},
		{"guest list ", ""},
	} {
		names, files := complete(t, append([]string{"--agent", socket}, strings.Split(c.line, " ")...)...)
		if got := strings.Join(names, " "); got != c.want || files {
			t.Errorf("lmctl %s<TAB>: %q, files %v, want %q", c.line, got, files, c.want)
		}
	}
}

// Where a file or a folder is wanted, the shell offers them.
func TestCompletePaths(t *testing.T) {
	for _, line := range []string{"guest define ", "pki show ", "pki init ", "agent --config ", "--tls-dir ", "pki issue --ca "} {
		if names, files := complete(t, strings.Split(line, " ")...); len(names) != 0 || !files {
			t.Errorf("lmctl %s<TAB>: %q, files %v", line, names, files)
		}
	}
}

// An agent that is not there, that hangs, or that may not be asked, is silence.
func TestCompleteWithoutAnAgent(t *testing.T) {
	for _, agent := range []string{filepath.Join(t.TempDir(), "none.sock"), "nowhere", "127.0.0.1:1"} {
		for _, line := range []string{"guest show ", "migrate web ", "migration show "} {
			args := append([]string{cobra.ShellCompRequestCmd, "--agent", agent, "--tls-dir", t.TempDir()}, strings.Split(line, " ")...)
			code, out, errOut := lmctl(t, args...)
			if code != 0 || out != ":4\n" || strings.Contains(errOut, "lmctl:") {
				t.Errorf("lmctl --agent %s %s<TAB>: code %d, out %q, err %q", agent, line, code, out, errOut)
			}
		}
	}
}

// Each command that takes a name of a guest, a host or a migration completes it,
// and no entry is for a command that is not there.
func TestEveryNameIsCompleted(t *testing.T) {
	root, _ := newRootCommand(streams{})
	left := map[string]bool{}
	for path := range completions {
		left[path] = true
	}
	var check func(*cobra.Command)
	check = func(cmd *cobra.Command) {
		path := cmd.CommandPath()
		delete(left, path)
		for i, arg := range strings.Fields(cmd.Use)[1:] {
			named := slices.Contains([]string{"NAME", "[NAME]", "GUEST", "HOST", "ID"}, arg)
			ours := !strings.HasPrefix(path, "lmctl lab ") && !strings.HasPrefix(path, "lmctl pki ")
			if named && ours && len(completions[path]) <= i {
				t.Errorf("%s: %s is not completed", path, arg)
			}
		}
		for _, c := range cmd.Commands() {
			check(c)
		}
	}
	check(root)
	for path := range left {
		t.Errorf("completions for %q, which is no command", path)
	}
}
