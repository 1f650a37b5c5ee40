package lab

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// put writes a file that only its content makes known.
func put(t *testing.T, text string, path ...string) {
	t.Helper()
	at := filepath.Join(path...)
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// A host with an installation of its own sees it at the machine's places; the
// other host, and the machine, do not.
func TestInstallation(t *testing.T) {
	top, bottom := t.TempDir(), t.TempDir()
	put(t, "top", top, "share", "lmctl-lab-test", "both")
	put(t, "bottom", bottom, "share", "lmctl-lab-test", "both")
	put(t, "bottom", bottom, "share", "lmctl-lab-test", "one")
	put(t, "alone", bottom, "lib", "x86_64-linux-gnu", "qemu", "module")
	for _, dir := range []string{top, bottom} {
		if err := os.Chmod(dir, 0o755); err != nil { // it becomes /usr
			t.Fatal(err)
		}
	}
	in, err := Unpacked(top, bottom)
	if err != nil {
		t.Fatal(err)
	}
	in.Libvirtd, in.Virtlogd = "", "" // the machine's
	l := upLibvirt(t, Options{NoAgents: true, Libvirt: LibvirtOptions{Installations: map[string]Installation{"host2": in}}})
	const show = "cd /usr && cat share/lmctl-lab-test/both share/lmctl-lab-test/one lib/x86_64-linux-gnu/qemu/module && ls -a lib/x86_64-linux-gnu/qemu"
	out, err := l.Output(t.Context(), "host2", "sh", "-c", show)
	if got := strings.Fields(string(out)); err != nil || strings.Join(got, " ") != "topbottomalone. .. module" {
		t.Errorf("host2 sees %q, %v", got, err)
	}
	if out, err := l.Output(t.Context(), "host2", "sh", "-c", "echo >/usr/share/lmctl-lab-test/new"); err == nil {
		t.Errorf("host2 can write below /usr: %q", out)
	}
	if out, err := l.Output(t.Context(), "host1", "ls", "/usr/share/lmctl-lab-test"); err == nil {
		t.Errorf("host1 sees host2's: %q", out)
	}
	if _, err := os.Stat("/usr/share/lmctl-lab-test"); !os.IsNotExist(err) {
		t.Errorf("the machine sees host2's: %v", err)
	}
	if got := virsh(t, l, "host2", "hostname"); got != "host2" {
		t.Errorf("libvirt of host2 says that it is on %q", got)
	}
	down(t, l)
}
