package testenv

import (
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// recorder is a test that writes down how it ended.
type recorder struct {
	testing.TB
	attrs []string
	ended string
}

func (r *recorder) Helper()                { r.TB.Helper() }
func (r *recorder) Attr(key, value string) { r.attrs = append(r.attrs, key+"="+value) }

func (r *recorder) Skipf(format string, args ...any) {
	r.ended = "skipped: " + fmt.Sprintf(format, args...)
	runtime.Goexit()
}

func (r *recorder) Fatalf(format string, args ...any) {
	r.ended = "failed: " + fmt.Sprintf(format, args...)
	runtime.Goexit()
}

// record runs f as a test would be run.
func record(t *testing.T, f func(testing.TB)) *recorder {
	t.Helper()
	r := &recorder{TB: t, ended: "passed"}
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(r)
	}()
	<-done
	return r
}

func TestNeed(t *testing.T) {
	lacking := fmt.Errorf("probe: %w: too old", errors.ErrUnsupported)
	for _, c := range []struct {
		ci    string
		err   error
		ended string
		attrs string
	}{
		{"", nil, "passed", ""},
		{"true", nil, "passed", ""},
		{"", lacking, "skipped: this machine lacks a thing: " + lacking.Error(), "lmctl.lacks=a thing"},
		{"true", lacking, "skipped: this machine lacks a thing: " + lacking.Error(), "lmctl.lacks=a thing"},
		{"", unix.EACCES, "skipped: missing a thing: permission denied", "lmctl.missing=a thing"},
		{"true", unix.EACCES, "failed: missing a thing, which a CI run must have: permission denied", ""},
	} {
		t.Setenv("CI", c.ci)
		r := record(t, func(tb testing.TB) { Need(tb, "a thing", c.err) })
		if r.ended != c.ended {
			t.Errorf("CI=%q, %v: %s, want %s", c.ci, c.err, r.ended, c.ended)
		}
		if got := strings.Join(r.attrs, " "); got != c.attrs {
			t.Errorf("CI=%q, %v: attributes %q, want %q", c.ci, c.err, got, c.attrs)
		}
	}
}

func TestNeedTrackerNotes(t *testing.T) {
	r := record(t, func(tb testing.TB) { NeedTracker(tb, func() error { return nil }) })
	if r.ended != "passed" || strings.Join(r.attrs, " ") != "lmctl.ran=tracker" {
		t.Errorf("%s with %q", r.ended, r.attrs)
	}
	r = record(t, func(tb testing.TB) { NeedTracker(tb, func() error { return errors.ErrUnsupported }) })
	if !strings.HasPrefix(r.ended, "skipped") || strings.Join(r.attrs, " ") != "lmctl.lacks=dirty page tracking" {
		t.Errorf("%s with %q", r.ended, r.attrs)
	}
}

func TestNeedTool(t *testing.T) {
	t.Setenv("CI", "true")
	t.Setenv("PATH", t.TempDir())
	r := record(t, func(tb testing.TB) { NeedQEMU(tb) })
	if !strings.HasPrefix(r.ended, "failed: missing qemu-system-x86_64") {
		t.Error(r.ended)
	}
}

func TestProbeKVM(t *testing.T) {
	if err := probeKVM(filepath.Join(t.TempDir(), "kvm")); !errors.Is(err, errors.ErrUnsupported) || !errors.Is(err, unix.ENOENT) {
		t.Errorf("no node: %v", err)
	}
	if err := probeKVM("/dev/null"); !errors.Is(err, errors.ErrUnsupported) || !errors.Is(err, unix.ENOTTY) {
		t.Errorf("another device: %v", err)
	}
}

func TestOneLine(t *testing.T) {
	if got := oneLine(" a\n b\tc"); got != "a b c" {
		t.Errorf("%q", got)
	}
}
