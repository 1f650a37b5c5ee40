// Package e2e tests lmctl as it is used: agents of their own on hosts in
// network namespaces, real QEMU processes, real guests.
package e2e

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/lmctl/lmctl/test/labtest"
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
	if binary, err = labtest.Build(context.Background(), dir, "failpoint"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}
