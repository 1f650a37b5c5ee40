//go:build !amd64

package dirtymap

import (
	"fmt"
	"runtime"
)

type sysCall func(nr uint64, args ...uint64) (uint64, error)

func afterStep(string) {}

// inject needs to know the registers, the signal frame and the code of each
// architecture.
func inject(Process, func(call sysCall) error) error {
	return fmt.Errorf("%w: tracking is written for amd64, this is %s", ErrUnsupported, runtime.GOARCH)
}
