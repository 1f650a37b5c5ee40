package testenv

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
)

// cacheDir is where the scripts leave what tests need and nobody wants
// installed: LMCTL_CACHE, or a folder of the system's for root and of the user's
// for others.
func cacheDir() (string, error) {
	if dir := os.Getenv("LMCTL_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	if os.Getuid() == 0 {
		return "/var/cache/lmctl", nil
	}
	dir, err := os.UserCacheDir()
	return filepath.Join(dir, "lmctl"), err
}

// NeedQEMU10 returns a QEMU of version 10 or later and the folder with its
// firmware, as scripts/fetch-qemu10 leaves them. The binary finds its firmware
// by itself.
func NeedQEMU10(t testing.TB) (binary, firmware string) {
	t.Helper()
	cache, err := cacheDir()
	if err != nil {
		Missing(t, "QEMU 10", err)
	}
	dir := filepath.Join(cache, "qemu-10")
	binary, firmware = filepath.Join(dir, "qemu-system-x86_64"), filepath.Join(dir, "firmware")
	Need(t, "QEMU 10", probeQEMU(binary, 10))
	t.Attr(AttrRan, RanQEMU10)
	return binary, firmware
}

var qemuVersion = regexp.MustCompile(`^QEMU emulator version ([0-9]+)\.`)

// probeQEMU runs a QEMU and looks at its version.
func probeQEMU(binary string, major int) error {
	out, err := exec.Command(binary, "--version").CombinedOutput()
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w; scripts/fetch-qemu10 puts it there", err)
	}
	if err != nil {
		return fmt.Errorf("%s --version: %w: %s", binary, err, oneLine(string(out)))
	}
	m := qemuVersion.FindSubmatch(out)
	if m == nil {
		return fmt.Errorf("%s --version says %q", binary, out)
	}
	if n, err := strconv.Atoi(string(m[1])); err != nil || n < major {
		return fmt.Errorf("%s is version %s, not %d or later", binary, m[1], major)
	}
	return nil
}

// NeedLibvirt11 returns the folders that make a host with libvirt 11 or later and
// QEMU 10 or later if they are laid over the machine's /usr, the first on top, as
// scripts/fetch-libvirt11 and scripts/fetch-qemu10 leave them. They are empty, or
// none, for what the machine has itself.
func NeedLibvirt11(t testing.TB) (layers []string) {
	t.Helper()
	cache, err := cacheDir()
	if err != nil {
		Missing(t, "libvirt 11", err)
	}
	NeedQEMU10(t)
	layer := filepath.Join(cache, "libvirt-11", "root", "usr")
	if _, err := os.Stat(layer); err != nil {
		Missing(t, "libvirt 11", fmt.Errorf("%w; scripts/fetch-libvirt11 puts it there", err))
	}
	layers = append(layers, layer)
	if qemu := filepath.Join(cache, "qemu-10", "root", "usr"); isDir(qemu) {
		layers = append(layers, qemu)
	}
	t.Attr(AttrRan, RanLibvirt11)
	return layers
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// NeedDebianRoot returns a root folder with a Debian in it, as
// scripts/debian-root leaves it. It is not to be changed: mount something over
// it.
func NeedDebianRoot(t testing.TB) string {
	t.Helper()
	cache, err := cacheDir()
	if err != nil {
		Missing(t, "a Debian root", err)
	}
	dir := filepath.Join(cache, "debian-13")
	// Written last.
	if _, err := os.Stat(dir + ".made"); err != nil {
		Missing(t, "a Debian root", fmt.Errorf("%w; scripts/debian-root puts it there", err))
	}
	return dir
}
