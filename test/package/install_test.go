package deb

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// ledgers are files that dpkg, systemctl and the index of manual pages keep for
// themselves: what is in them differs after a package came and went.
var ledgers = []string{
	"var/lib/dpkg/status", "var/lib/dpkg/status-old", "var/lib/dpkg/triggers/File", "var/lib/dpkg/triggers/Unincorp",
	"var/log/dpkg.log", "var/cache/man/index.db", "run/systemd/systemd-units-load",
}

// listing is what is in a root: each path with its type, mode, owner and the
// checksum of its contents.
func (r *root) listing() map[string]string {
	r.t.Helper()
	list := map[string]string{}
	err := filepath.WalkDir(r.dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(r.dir, path)
		if name == "proc" {
			return fs.SkipDir
		}
		if err != nil || slices.Contains(ledgers, name) {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		owner := info.Sys().(*syscall.Stat_t)
		what := fmt.Sprintf("%v %d:%d", info.Mode(), owner.Uid, owner.Gid)
		switch {
		case info.Mode().IsRegular():
			sum, err := checksum(path)
			if err != nil {
				return err
			}
			what += " " + sum
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			what += " " + target
		}
		list[name] = what
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return list
}

func checksum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}

// differences says what one listing has that the other has not.
func differences(before, after map[string]string) []string {
	var list []string
	for _, name := range slices.Sorted(maps.Keys(before)) {
		if after[name] != before[name] {
			list = append(list, fmt.Sprintf("%s: %q became %q", name, before[name], after[name]))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(after)) {
		if _, was := before[name]; !was {
			list = append(list, fmt.Sprintf("%s: %q is new", name, after[name]))
		}
	}
	return list
}

// What is installed is there and works, and a purge leaves nothing of it.
func TestInstallAndPurge(t *testing.T) {
	r := newRoot(t)
	deb := r.copyPackage()
	// libvirt's rules as Debian 12 has them, with one file for local ones.
	r.put("/etc/apparmor.d/abstractions/libvirt-qemu", "  #include <local/abstractions/libvirt-qemu>\n", 0o644)
	r.put("/etc/apparmor.d/local/abstractions/libvirt-qemu", "# an operator's\n", 0o644)
	r.do("mandb", "--quiet") // as on a machine that has been used
	before := r.listing()

	out := r.do("dpkg", "-i", deb)
	if !strings.Contains(out, "lmctl pki issue") {
		t.Errorf("the installation does not say what is next:\n%s", out)
	}
	t.Run("binary", func(t *testing.T) {
		if out := r.do("lmctl", "version"); !strings.HasPrefix(out, "lmctl ") {
			t.Error(out)
		}
		if out := r.do("lmctl", "agent", "--print-config"); !strings.Contains(out, "/var/lib/lmctl") {
			t.Error(out)
		}
	})
	t.Run("manual", func(t *testing.T) {
		for page, want := range map[string]string{"lmctl": "EXIT CODES", "lmctl-migrate": "--max-passes", "lmctl-agent": "--config", "lmctl-agent.yaml": "memory_reserve"} {
			// By its path: what is looked up by name is kept, formatted.
			if out := r.do("man", "-l", r.do("man", "-w", page)); !strings.Contains(strings.ToUpper(out), strings.ToUpper(want)) {
				t.Errorf("man %s lacks %q:\n%s", page, want, out)
			}
		}
	})
	t.Run("completion", func(t *testing.T) {
		r.do("bash", "-n", "/usr/share/bash-completion/completions/lmctl")
		out := r.do("bash", "-c", ". /usr/share/bash-completion/completions/lmctl && complete -p lmctl")
		if !strings.Contains(out, "__start_lmctl") {
			t.Error(out)
		}
		r.sh("test -s /usr/share/zsh/vendor-completions/_lmctl && test -s /usr/share/fish/vendor_completions.d/lmctl.fish")
	})
	t.Run("unit", func(t *testing.T) {
		if out := r.do("systemd-analyze", "verify", "--man=no", "lmctl-agent.service"); out != "" {
			t.Error(out)
		}
		if out := r.do("systemctl", "is-enabled", "lmctl-agent"); out != "enabled" {
			t.Errorf("the unit is %s", out)
		}
	})
	t.Run("apparmor", r.checkRules)
	t.Run("configuration", func(t *testing.T) {
		r.sh("echo 'name: changed' >>/etc/lmctl/agent.yaml")
		r.do("dpkg", "--force-confold", "-i", deb)
		if out := r.do("lmctl", "agent", "--print-config"); !strings.Contains(out, "name: changed") {
			t.Errorf("an upgrade has lost a change:\n%s", out)
		}
	})

	// What the agent and its operator would have left.
	r.sh("mkdir -p /etc/lmctl/tls /var/lib/lmctl/guests/web && touch /etc/lmctl/tls/key.pem /var/lib/lmctl/guests/web/qemu.log")
	r.do("dpkg", "-r", "lmctl")
	r.sh("test -e /etc/lmctl/agent.yaml && test -e /var/lib/lmctl/guests/web && test ! -e /usr/bin/lmctl")
	r.do("dpkg", "-P", "lmctl")
	if left := differences(before, r.listing()); len(left) > 0 {
		t.Errorf("the package leaves traces:\n%s", strings.Join(left, "\n"))
	}
}

// checkRules reads the rules with AppArmor's own parser, and sees that libvirt's
// profiles would have them.
func (r *root) checkRules(t *testing.T) {
	r.put("/tmp/profile", "abi <abi/4.0>,\ninclude <tunables/global>\nprofile test {\n  include <abstractions/base>\n  include <abstractions/libvirt-qemu>\n}\n", 0o644)
	out := r.do("apparmor_parser", "-Q", "-K", "-p", "/tmp/profile")
	for _, want := range []string{"# an operator's", "tracedby", "run/lmctl/libvirt/**"} {
		if !strings.Contains(out, want) {
			t.Errorf("libvirt's profiles lack %q:\n%s", want, out)
		}
	}
	r.do("apparmor_parser", "-Q", "-K", "/tmp/profile")
	r.do("rm", "/tmp/profile")
}

// Debian 13's rules include ours by themselves.
func TestRulesOfDebian13(t *testing.T) {
	r := newRoot(t)
	deb := r.copyPackage()
	r.put("/etc/apparmor.d/abstractions/libvirt-qemu", "  include if exists <abstractions/libvirt-qemu.d>\n  include if exists <local/abstractions/libvirt-qemu>\n", 0o644)
	r.put("/etc/apparmor.d/local/abstractions/libvirt-qemu", "# an operator's\n", 0o644)
	r.do("dpkg", "-i", deb)
	t.Run("rules", r.checkRules)
	if out := r.sh("cat /etc/apparmor.d/local/abstractions/libvirt-qemu"); out != "# an operator's" {
		t.Errorf("the operator's file was touched:\n%s", out)
	}
}
