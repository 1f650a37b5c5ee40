package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCheckAppArmor(t *testing.T) {
	dir := t.TempDir()
	enabled, rules := filepath.Join(dir, "enabled"), filepath.Join(dir, "lmctl")
	write := func(path, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if l := checkAppArmor(enabled, rules); l != nil {
		t.Errorf("without AppArmor: %v", l)
	}
	write(enabled, "N\n")
	if l := checkAppArmor(enabled, rules); l != nil {
		t.Errorf("with AppArmor off: %v", l)
	}
	write(enabled, "Y\n")
	if l := checkAppArmor(enabled, rules); l == nil || l.Verdict != fail || !strings.Contains(l.Advice, rules) {
		t.Errorf("without the rules: %v", l)
	}
	write(rules, "")
	if l := checkAppArmor(enabled, rules); l == nil || l.Verdict != pass {
		t.Errorf("with the rules: %v", l)
	}
}

// An agent without libvirt says so, when it is asked about libvirt.
func TestCheckLibvirtd(t *testing.T) {
	a := &Agent{driver: newFake()}
	if l := a.checkLibvirtd(t.Context()); l.Verdict != fail {
		t.Errorf("%v", l)
	}
}
