package testenv

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// CI says whether this is a CI run, in which nothing may be skipped that could
// have been set up.
func CI() bool { return os.Getenv("CI") == "true" }

// Lacks skips a test for what the machine itself lacks; why is how that was
// found out.
func Lacks(t testing.TB, what string, why error) {
	t.Helper()
	t.Attr(AttrLacks, oneLine(what))
	t.Skipf("this machine lacks %s: %v", what, why)
}

// Missing skips a test for what could have been set up on this machine, and
// fails it in a CI run.
func Missing(t testing.TB, what string, why error) {
	t.Helper()
	if CI() {
		t.Fatalf("missing %s, which a CI run must have: %v", what, why)
	}
	t.Attr(AttrMissing, oneLine(what))
	t.Skipf("missing %s: %v", what, why)
}

// Need judges a probe of the machine: nil passes, errors.ErrUnsupported is what
// the machine lacks, and everything else was not set up.
func Need(t testing.TB, what string, err error) {
	t.Helper()
	switch {
	case err == nil:
	case errors.Is(err, errors.ErrUnsupported):
		Lacks(t, what, err)
	default:
		Missing(t, what, err)
	}
}

// NeedRoot is for tests that make namespaces, devices and the like.
func NeedRoot(t testing.TB) {
	t.Helper()
	if euid := os.Geteuid(); euid != 0 {
		Missing(t, "root", fmt.Errorf("user ID %d", euid))
	}
}

// NeedKVM is for tests that run a guest on real KVM, and notes that they do.
func NeedKVM(t testing.TB) {
	t.Helper()
	Need(t, "KVM", probeKVM("/dev/kvm"))
	t.Attr(AttrRan, RanKVM)
}

// TCG notes that a test runs a guest under TCG, which needs nothing but QEMU.
func TCG(t testing.TB) {
	t.Helper()
	t.Attr(AttrRan, RanTCG)
}

// NeedTracker is for tests that track dirty pages; probe is dirtymap.Probe,
// passed so that dirtymap's own tests can use this package.
func NeedTracker(t testing.TB, probe func() error) {
	t.Helper()
	Need(t, "dirty page tracking", probe())
	t.Attr(AttrRan, RanTracker)
}

// NeedTool returns the path of a program.
func NeedTool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		Missing(t, name, err)
	}
	return path
}

// NeedQEMU returns the path of the machine's own QEMU.
func NeedQEMU(t testing.TB) string {
	t.Helper()
	return NeedTool(t, "qemu-system-x86_64")
}

// KVM's way to say what it speaks, and the one version ever since Linux 2.6.22:
// linux/kvm.h.
const (
	kvmGetAPIVersion = 0xae00
	kvmAPIVersion    = 12
)

// probeKVM tries the device. Its error is errors.ErrUnsupported where the
// machine has no KVM at all.
func probeKVM(path string) (err error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%w: open %s: %w", errors.ErrUnsupported, path, err)
	case err != nil:
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	version, err := unix.IoctlRetInt(fd, kvmGetAPIVersion)
	if err != nil {
		return fmt.Errorf("%w: %s: KVM_GET_API_VERSION: %w", errors.ErrUnsupported, path, err)
	}
	if version != kvmAPIVersion {
		return fmt.Errorf("%w: %s: API version %d, not %d", errors.ErrUnsupported, path, version, kvmAPIVersion)
	}
	return nil
}

// oneLine makes a text fit for an attribute.
func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
