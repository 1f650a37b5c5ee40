package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/linux"
)

// Fresh makes a lab for the life of this process: what a killed process has left
// in the folder is removed first, even if it is up, while one of a process that
// still lives is ErrUp. end removes the lab and may be called whatever became of
// ctx.
func Fresh(ctx context.Context, o Options) (l *Lab, end func() error, err error) {
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, nil, fmt.Errorf("lab: %w", err)
	}
	if os.Geteuid() != 0 {
		return nil, nil, errNotRoot
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return nil, nil, fmt.Errorf("lab: %w", err)
	}
	// Beside the folder, since that is removed. It goes with the process.
	alive, err := os.OpenFile(dir+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("lab: %w", err)
	}
	if err := unix.Flock(int(alive.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("%w in %s: its process still lives", ErrUp, dir), alive.Close())
	}
	if err = Down(ctx, dir); err == nil {
		l, err = Up(ctx, o)
	}
	if err != nil {
		return nil, nil, errors.Join(err, alive.Close())
	}
	return l, func() error {
		// The lock file stays: who opened it already may be waiting for it.
		return errors.Join(Down(context.WithoutCancel(ctx), dir), alive.Close())
	}, nil
}

// BootFiles are what Linux guests boot from, found or made.
func BootFiles(ctx context.Context, say func(string)) (linux.Boot, error) {
	return prepareLinux(ctx, say)
}
