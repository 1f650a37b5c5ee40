// Package directio tests that no disk read by direct I/O is lost in a
// migration. Such a read pins pages of the guest when it is submitted and
// writes them when it completes, past the page tables and so past the tracker.
// What keeps them is the drain in each pass; a test without it shows what the
// others are worth.
package directio

import (
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// inNamespace marks a test process that has a mount namespace of its own.
const inNamespace = "LMCTL_TEST_MOUNTNS"

// TestMain runs the tests in a mount namespace of their own where it may: a
// disk that a test serves goes with the test, however that ends.
func TestMain(m *testing.M) {
	if os.Getenv(inNamespace) == "" && os.Getuid() == 0 {
		os.Exit(again())
	}
	os.Exit(m.Run())
}

func again() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inNamespace+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	if cmd.ProcessState == nil {
		_, _ = os.Stderr.WriteString("no mount namespace for the tests: " + err.Error() + "\n")
		return 1
	}
	return cmd.ProcessState.ExitCode()
}
