package qemu

import (
	"os"
	"os/exec"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

// inNamespace marks a test process that has a network namespace of its own.
const inNamespace = "LMCTL_TEST_NETNS"

// TestMain runs the tests in a network namespace of their own where it may:
// bridges and taps are nowhere else.
func TestMain(m *testing.M) {
	if os.Getenv(inNamespace) == "" && os.Getuid() == 0 {
		os.Exit(again())
	}
	goleak.VerifyTestMain(m)
}

func again() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inNamespace+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	if cmd.ProcessState == nil {
		// Not allowed to: the tests that need it say so.
		_, _ = os.Stderr.WriteString("no network namespace for the tests: " + err.Error() + "\n")
		return 1
	}
	return cmd.ProcessState.ExitCode()
}
