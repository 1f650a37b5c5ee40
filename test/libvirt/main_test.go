// Package libvirt tests lmctl with the domains of real libvirtd's: agents of
// their own on hosts in namespaces, each beside its host's libvirtd.
package libvirt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/lmctl/lmctl/guest/linux"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/test/labtest"
)

// all says that every shape and every cell of the matrix is wanted, which takes
// longer than those who test everything have.
var all = os.Getenv("LMCTL_LIBVIRT_ALL") != ""

// work has the binary, an lmctl built with failpoints, and the lab.
var work struct{ dir, binary string }

// common is the lab of all tests, made by the first that wants it.
var common *lab.Lab

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) (code int) {
	defer func() {
		if err := tearDown(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}()
	if err := setUp(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

func setUp(ctx context.Context) (err error) {
	if work.dir, err = os.MkdirTemp("", "lmctl-libvirt-"); err != nil {
		return err
	}
	if work.binary, err = labtest.Build(ctx, work.dir, "failpoint"); err != nil {
		return err
	}
	init, err := linux.BuildInit(ctx)
	if err != nil {
		return err
	}
	file := filepath.Join(work.dir, "init")
	return errors.Join(os.WriteFile(file, init, 0o600), os.Setenv("LMCTL_GUEST_INIT", file))
}

func tearDown() error {
	if common != nil {
		if err := labtest.Down(common); err != nil {
			return err
		}
	}
	return os.RemoveAll(work.dir)
}
