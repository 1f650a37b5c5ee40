//go:build !failpoint

package migrate

// failpoint is where the crash tests stop an agent that was built for them.
func failpoint(string, State) {}
