// Package e2e tests lmctl as it is used: agents of their own on hosts in
// network namespaces, real QEMU processes, real guests.
package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// binary is an lmctl built with failpoints, so that an agent can be held at
// each state of a migration.
var binary string

func TestMain(m *testing.M) { os.Exit(setUp(m)) }

func setUp(m *testing.M) int {
	dir, err := os.MkdirTemp("", "lmctl-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "lmctl")
	build := exec.CommandContext(context.Background(), "go", "build", "-tags", "failpoint", "-o", binary, "github.com/lmctl/lmctl/cmd/lmctl")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build lmctl:", err)
		return 1
	}
	return m.Run()
}
