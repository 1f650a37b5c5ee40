package main

import (
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/migrate"
)

// The exit codes. They are part of the command line's contract.
const (
	exitOther   = 1
	exitUsage   = 2
	exitRefused = 3
	exitFailed  = 4
	exitInDoubt = 5
)

// usageError is a command line that cannot be understood.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// migrationError is a migration that did not complete.
type migrationError struct {
	result migrate.Result
	text   string
}

func (e *migrationError) Error() string { return e.text }

// silentError ends the program with a code and no further word.
type silentError struct{ code int }

func (e *silentError) Error() string { return fmt.Sprintf("exit code %d", e.code) }

// exitCode is the code that an error ends the program with.
func exitCode(err error) int {
	var silent *silentError
	var usage *usageError
	var migration *migrationError
	var remote *api.Error
	switch {
	case errors.As(err, &silent):
		return silent.code
	case errors.As(err, &usage):
		return exitUsage
	case errors.As(err, &migration):
		return resultCode(migration.result)
	case errors.As(err, &remote) && remote.Code == codes.InvalidArgument && remote.Result == "":
		return exitUsage
	case errors.As(err, &remote):
		return resultCode(migrate.Result(remote.Result))
	}
	return exitOther
}

func resultCode(r migrate.Result) int {
	switch r {
	case migrate.Refused:
		return exitRefused
	case migrate.Failed, migrate.Cancelled:
		return exitFailed
	case migrate.InDoubt:
		return exitInDoubt
	}
	return exitOther
}

// errorObject is an error in JSON.
type errorObject struct {
	Operation string   `json:"operation,omitempty"`
	Object    string   `json:"object,omitempty"`
	Cause     string   `json:"cause"`
	Result    string   `json:"result,omitempty"`
	Reasons   []string `json:"reasons,omitempty"`
	ExitCode  int      `json:"exit_code"`
}

// oneLine makes a text of several lines one, each of its causes still apart.
func oneLine(s string) string {
	lines := strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' })
	for i, l := range lines {
		lines[i] = strings.Join(strings.Fields(l), " ")
	}
	return strings.Join(lines, "; ")
}

// printError says what went wrong: in one line, or as an object on standard
// output, where the result would have been.
func printError(o *options, err error, code int) {
	if !o.json {
		fmt.Fprintf(o.err, "lmctl: %s\n", oneLine(err.Error()))
		return
	}
	obj := errorObject{Cause: err.Error(), ExitCode: code}
	var remote *api.Error
	if errors.As(err, &remote) {
		obj.Operation, obj.Object, obj.Cause = remote.Operation, remote.Object, remote.Cause
		obj.Result, obj.Reasons = remote.Result, remote.Reasons
	}
	if perr := printJSON(o.out, map[string]errorObject{"error": obj}); perr != nil {
		fmt.Fprintf(o.err, "lmctl: %v\n", perr)
	}
}
