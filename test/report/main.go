// Command report runs go test, and says at the end of a run what the tests ran
// on.
//
//	report run -log FILE -- ARGUMENTS…
//
// runs go test -json with the arguments, prints what go test without -json would
// print, and appends the events to the file. It exits with go test's status.
//
//	report summary FILE
//
// prints the tests that were skipped, those that failed with what they said, and
// one line that counts how many ran, on what, and what was skipped and why. Where CI=true it exits with 1 if a test
// was skipped for another reason than that the machine itself cannot; see
// internal/testenv.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"github.com/lmctl/lmctl/internal/testenv"
)

func main() {
	status, err := command(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		status = max(status, 1)
	}
	os.Exit(status)
}

func command(args []string) (status int, err error) {
	if len(args) == 2 && args[0] == "summary" {
		return summary(args[1])
	}
	if len(args) > 0 && args[0] == "run" {
		flags := flag.NewFlagSet("run", flag.ContinueOnError)
		log := flags.String("log", "", "file to append the events to")
		if err := flags.Parse(args[1:]); err != nil {
			return 2, err
		}
		if *log != "" {
			return run(*log, flags.Args())
		}
	}
	return 2, errors.New("usage: report run -log FILE -- ARGUMENTS… | report summary FILE")
}

// run returns go test's exit status.
func run(path string, args []string) (status int, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return 1, err
	}
	log, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 1, err
	}
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	renderErr := render(os.Stdout, io.TeeReader(out, log))
	if renderErr != nil {
		// Let go test end all the same.
		_, drainErr := io.Copy(log, out)
		renderErr = errors.Join(renderErr, drainErr)
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return exit.ExitCode(), renderErr
	}
	return 0, errors.Join(err, renderErr)
}

func summary(path string) (status int, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 1, err
	}
	defer f.Close()
	t, err := tallyOf(f)
	if err != nil {
		return 1, fmt.Errorf("%s: %w", path, err)
	}
	var objections []string
	if testenv.CI() {
		objections = t.objections()
	}
	for _, line := range slices.Concat(t.skipLines(), t.failLines(), objections) {
		fmt.Println(line)
	}
	fmt.Println(t.line())
	if len(objections) > 0 {
		return 1, nil
	}
	return 0, nil
}
