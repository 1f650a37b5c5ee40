package linux

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

//go:embed payload
var payload embed.FS

// ErrNoInit says that this binary was built without the guest's init.
var ErrNoInit = errors.New("this build has no init for Linux guests: build it with `make build`")

// Init returns the init program that was built into this binary, or ErrNoInit.
func Init() ([]byte, error) {
	b, err := payload.ReadFile("payload/init")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNoInit
	}
	return b, err
}

// BuildInit builds the init program with the go command, from within this
// module: for tests, which run without `make build`.
func BuildInit(ctx context.Context) ([]byte, error) {
	dir, err := os.MkdirTemp("", "lmctl-init-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "init")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", out, "github.com/lmctl/lmctl/guest/init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if said, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the guest's init: %w: %s", err, strings.TrimSpace(string(said)))
	}
	return os.ReadFile(out)
}
