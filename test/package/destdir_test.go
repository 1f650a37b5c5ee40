package deb

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/lmctl/lmctl/internal/testenv"
)

// install is what make install and make uninstall do, below a folder.
func install(t *testing.T, what, dest string) string {
	t.Helper()
	if _, err := os.Stat("../../dist/man/lmctl.1"); err != nil {
		testenv.Missing(t, "the manual pages (make docs)", err)
	}
	cmd := exec.CommandContext(t.Context(), "../../packaging/install", what)
	cmd.Env = append(os.Environ(), "DESTDIR="+dest, "PREFIX=", "SYSCONFDIR=", "ZSHDIR=")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("packaging/install %s: %v\n%s", what, err, out)
	}
	return string(out)
}

func filesIn(t *testing.T, dir string) []string {
	t.Helper()
	var list []string
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			list = append(list, strings.TrimPrefix(path, dir))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// Without a package: what is installed below DESTDIR goes again, and
// configuration is neither overwritten nor removed.
func TestInstallAndUninstall(t *testing.T) {
	dest := t.TempDir()
	install(t, "install", dest)
	files := filesIn(t, dest)
	for _, want := range []string{
		"/usr/local/bin/lmctl", "/usr/local/lib/systemd/system/lmctl-agent.service", "/usr/local/share/man/man1/lmctl-guest-show.1",
		"/usr/local/share/man/man5/lmctl-agent.yaml.5", "/usr/local/share/bash-completion/completions/lmctl",
		"/usr/local/share/zsh/site-functions/_lmctl", "/usr/local/share/fish/vendor_completions.d/lmctl.fish",
	} {
		if !slices.Contains(files, want) {
			t.Errorf("%s is not installed", want)
		}
	}
	unit, err := os.ReadFile(filepath.Join(dest, "usr/local/lib/systemd/system/lmctl-agent.service"))
	if err != nil || !strings.Contains(string(unit), "\nExecStart=/usr/local/bin/lmctl agent --config /etc/lmctl/agent.yaml\n") {
		t.Errorf("the unit runs something else: %v\n%s", err, unit)
	}
	config := filepath.Join(dest, "etc/lmctl/agent.yaml")
	if err := os.WriteFile(config, []byte("name: changed\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := install(t, "install", dest); !strings.Contains(out, "/etc/lmctl/agent.yaml stays as it is") {
		t.Errorf("the second installation says nothing of the configuration:\n%s", out)
	}
	install(t, "uninstall", dest)
	if text, err := os.ReadFile(config); err != nil || string(text) != "name: changed\n" {
		t.Errorf("the configuration: %q, %v", text, err)
	}
	want := []string{"/etc/apparmor.d/abstractions/libvirt-qemu.d/lmctl", "/etc/lmctl/agent.yaml"}
	if left := filesIn(t, dest); !slices.Equal(left, want) {
		t.Errorf("left are %q, want %q", left, want)
	}
	if _, err := os.Stat(filepath.Join(dest, "usr/local/share")); err == nil {
		t.Error("empty folders are left")
	}
}
