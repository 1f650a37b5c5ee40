package testenv

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
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
