package manpages

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/lmctl/lmctl/internal/agent"
	"github.com/lmctl/lmctl/internal/testenv"
)

var date = time.Date(2030, 1, 2, 0, 0, 0, 0, time.UTC)

func writePages(t *testing.T) string {
	t.Helper()
	root := &cobra.Command{Use: "prog", Short: "A program", Long: "Some_thing *new*.\n\nCodes:\n  0  done\n  1  <not> done\nEnd."}
	root.PersistentFlags().String("tls-dir", "/home/someone/.config", "folder")
	run := func(*cobra.Command, []string) {}
	move := &cobra.Command{Use: "move WHAT", Short: "Move it", Example: "  prog move this", Run: run}
	move.Flags().Bool("quickly", false, "without waiting")
	root.AddCommand(move, &cobra.Command{Use: "secret", Hidden: true, Run: run})
	config, err := os.ReadFile("../agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := Write(dir, root, config, "1.2", date); err != nil {
		t.Fatal(err)
	}
	return dir
}

// show is a page as a reader sees it, without a complaint of the formatter's.
func show(t *testing.T, path string) string {
	t.Helper()
	cmd := exec.Command(testenv.NeedTool(t, "groff"), "-ww", "-man", "-Tascii", "-P-cbou", path)
	var complaints strings.Builder
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil || complaints.Len() != 0 {
		t.Errorf("format %s: %v\n%s", filepath.Base(path), err, complaints.String())
	}
	return string(out)
}

func TestPagesOfCommands(t *testing.T) {
	dir := writePages(t)
	var names []string
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if want := []string{"lmctl-agent.yaml.5", "prog-move.1", "prog.1"}; !reflect.DeepEqual(names, want) {
		t.Errorf("pages: %q, want %q", names, want)
	}
	page := show(t, filepath.Join(dir, "prog.1"))
	for _, want := range []string{"Some_thing *new*.", "  0  done\n", "  1  <not> done\n", "\n       End.", "~/.config/lmctl", "prog-move(1)", "Jan 2030"} {
		if !strings.Contains(page, want) {
			t.Errorf("prog(1) lacks %q:\n%s", want, page)
		}
	}
	page = show(t, filepath.Join(dir, "prog-move.1"))
	for _, want := range []string{"prog-move - Move it", "prog move WHAT", "\n       Move it.", "--quickly\n              without waiting", "prog move this"} {
		if !strings.Contains(page, want) {
			t.Errorf("prog-move(1) lacks %q:\n%s", want, page)
		}
	}
}

// The page has each key of the configuration, with its default.
func TestPageOfConfig(t *testing.T) {
	page := show(t, filepath.Join(writePages(t), "lmctl-agent.yaml.5"))
	for _, want := range append(keys("", reflect.TypeFor[agent.Config]()),
		"listen: 0.0.0.0:7410", `advertise: ""`, "migration.max_passes: 8", "host2: 192.0.2.2:7410") {
		if !strings.Contains(page, "\n       "+want) && !strings.Contains(page, "  "+want) {
			t.Errorf("lmctl-agent.yaml(5) lacks %q:\n%s", want, page)
		}
	}
}

func keys(prefix string, typ reflect.Type) []string {
	var list []string
	for field := range typ.Fields() {
		name, _, _ := strings.Cut(field.Tag.Get("yaml"), ",")
		if field.Type.Kind() == reflect.Struct {
			list = append(list, keys(prefix+name+".", field.Type)...)
		} else {
			list = append(list, prefix+name+": ")
		}
	}
	return list
}

func TestConfigRefusesWhatItCannotShow(t *testing.T) {
	for _, text := range []string{
		"", "# title\n", "# title\n\n# text\nname: host1\n", "# title\n\n# text\n#tls:\n#  ca: /x\n",
		"# title\n\n# text\n#tls:\n#  # why\n#  ca: /x\n# text\n",
	} {
		if page, err := Config([]byte(text), "1.2", date); err == nil {
			t.Errorf("%q makes a page:\n%s", text, page)
		}
	}
}
