//go:build failpoint

package migrate

import (
	"os"
	"path/filepath"
	"time"
)

// failpoint stops here for as long as the file role.state exists in the folder
// LMCTL_FAILPOINTS, after it has said so with a file role.state.reached. Only
// agents built for the crash tests have it.
func failpoint(role string, s State) {
	dir := os.Getenv("LMCTL_FAILPOINTS")
	if dir == "" {
		return
	}
	point := filepath.Join(dir, role+"."+string(s))
	if _, err := os.Stat(point); err != nil {
		return
	}
	if err := os.WriteFile(point+".reached", nil, 0o600); err != nil {
		panic(err) // a crash test that cannot see the point would wait for ever
	}
	for {
		if _, err := os.Stat(point); err != nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}
