package linux

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/cavaliergopher/cpio"
)

func TestParseDepends(t *testing.T) {
	out := "linux-image-cloud-amd64\n  Depends: linux-base\n  Depends: linux-image-6.1.0-9-cloud-amd64\n"
	if got := parseDepends(out); got != "linux-image-6.1.0-9-cloud-amd64" {
		t.Errorf("got %q", got)
	}
	if got := parseDepends("N: Unable to locate package\n"); got != "" {
		t.Errorf("got %q from an error", got)
	}
}

func TestParseModuleDepends(t *testing.T) {
	got := parseDependsOn("license=GPL\x00depends=virtio,virtio-ring\x00name=x\x00depends=\x00")
	if want := []string{"virtio", "virtio_ring"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestInitramfs(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"order": "a.ko\nb.ko\n", "a.ko": "AA", "b.ko": "B"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var one, two bytes.Buffer
	for _, w := range []io.Writer{&one, &two} {
		if err := WriteInitramfs(w, Kernel{Modules: dir}, []byte("INIT")); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(one.Bytes(), two.Bytes()) {
		t.Error("the same input gave different bytes")
	}
	z, err := gzip.NewReader(&one)
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]string)
	for r := cpio.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if h.Name == "init" && h.Mode.Perm() != 0o755 {
			t.Errorf("init has mode %o", h.Mode)
		}
		got[h.Name] = string(b)
	}
	want := map[string]string{"dev": "", "proc": "", "sys": "", "modules": "", "init": "INIT",
		"modules/order": "a.ko\nb.ko\n", "modules/a.ko": "AA", "modules/b.ko": "B"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if err := WriteInitramfs(io.Discard, Kernel{Modules: dir + "/none"}, nil); err == nil {
		t.Error("an initramfs without modules is made")
	}
}

func TestPrepareIsDoneOnce(t *testing.T) {
	cache := t.TempDir()
	modules := filepath.Join(cache, "kernel", "6.1.0", "modules")
	if err := os.MkdirAll(modules, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{filepath.Join(modules, "order"), filepath.Join(cache, "kernel", "6.1.0", "vmlinuz")} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	say := func(s string) { t.Errorf("something to do: %s", s) }
	one, err := Prepare(t.Context(), cache, []byte("A"), say)
	if err != nil {
		t.Fatal(err)
	}
	two, err := Prepare(t.Context(), cache, []byte("A"), say)
	if err != nil || one != two {
		t.Errorf("%+v, then %+v, error %v", one, two, err)
	}
	other, err := Prepare(t.Context(), cache, []byte("B"), say)
	if err != nil || other.Initrd == one.Initrd {
		t.Errorf("another init gave %+v, error %v", other, err)
	}
	if left, _ := filepath.Glob(filepath.Join(cache, "initramfs", ".new-*")); len(left) != 0 {
		t.Errorf("left behind: %q", left)
	}
}

func TestFetchWaitsForLock(t *testing.T) {
	cache := t.TempDir()
	unlock, err := lockDir(t.Context(), cache)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := FetchKernel(ctx, cache, func(string) {}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want the cancellation", err)
	}
}

func TestFindKernel(t *testing.T) {
	if _, err := FindKernel(t.TempDir()); !errors.Is(err, ErrNoKernel) {
		t.Errorf("error %v, want ErrNoKernel", err)
	}
}

func TestInit(t *testing.T) {
	b, err := Init()
	if err != nil && !errors.Is(err, ErrNoInit) {
		t.Fatal(err)
	}
	if err == nil && !strings.HasPrefix(string(b), "\x7fELF") {
		t.Errorf("the built-in init begins with %q", b[:min(len(b), 4)])
	}
}
