package testenv

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestProbeQEMU(t *testing.T) {
	dir := t.TempDir()
	script := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if err := probeQEMU(script("new", "echo 'QEMU emulator version 10.0.2 (Debian)'"), 10); err != nil {
		t.Error(err)
	}
	for path, want := range map[string]string{
		script("old", "echo QEMU emulator version 7.2.22"):    "version 7, not 10",
		script("broken", "echo no libfoo.so.1 >&2; exit 127"): "no libfoo.so.1",
		script("other", "echo bochs"):                         `says "bochs\n"`,
		filepath.Join(dir, "none"):                            "scripts/fetch-qemu10",
	} {
		if err := probeQEMU(path, 10); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
	if err := probeQEMU(filepath.Join(dir, "none"), 10); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("not there: %v", err)
	}
}

func TestNeedQEMU10LooksIntoCache(t *testing.T) {
	t.Setenv("CI", "true")
	t.Setenv("LMCTL_CACHE", t.TempDir())
	r := record(t, func(tb testing.TB) { NeedQEMU10(tb) })
	if !strings.HasPrefix(r.ended, "failed: missing QEMU 10") || !strings.Contains(r.ended, os.Getenv("LMCTL_CACHE")) {
		t.Error(r.ended)
	}
}

func TestNeedLibvirt11LooksIntoCache(t *testing.T) {
	cache := t.TempDir()
	t.Setenv("CI", "true")
	t.Setenv("LMCTL_CACHE", cache)
	qemu := filepath.Join(cache, "qemu-10")
	for _, dir := range []string{qemu, filepath.Join(cache, "libvirt-11", "root")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	script := "#!/bin/sh\necho 'QEMU emulator version 10.0.2 (Debian)'\n"
	if err := os.WriteFile(filepath.Join(qemu, "qemu-system-x86_64"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	r := record(t, func(tb testing.TB) { NeedLibvirt11(tb) })
	if !strings.HasPrefix(r.ended, "failed: missing libvirt 11") || !strings.Contains(r.ended, cache) || !strings.Contains(r.ended, "scripts/fetch-libvirt11") {
		t.Error(r.ended)
	}
	var want []string
	for _, dir := range []string{"libvirt-11", "qemu-10"} {
		layer := filepath.Join(cache, dir, "root", "usr")
		if err := os.MkdirAll(layer, 0o700); err != nil {
			t.Fatal(err)
		}
		want = append(want, layer)
		var got []string
		r := record(t, func(tb testing.TB) { got = NeedLibvirt11(tb) })
		if r.ended != "passed" || !slices.Equal(got, want) {
			t.Errorf("layers %q, want %q: %s", got, want, r.ended)
		}
	}
}
