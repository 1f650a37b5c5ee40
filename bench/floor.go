package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor/qemu"
)

// startFloor makes a guest that shows what QEMU itself needs at the least: it is
// stopped, its memory is copied outside of the measurement, its device state
// alone is saved and loaded, and it goes on. The downtime is the sum of what
// QEMU does.
func startFloor(ctx context.Context, b *bed, name string, definition []byte) (subject, error) {
	u, err := startUnmanaged(ctx, b, name, definition)
	if err != nil {
		return nil, err
	}
	u.travel = travelStopped
	return u, nil
}

func travelStopped(ctx context.Context, u *unmanaged, destination *qemu.Observer) (Own, error) {
	own := Own{timed: true}
	step := func(name string, f func() error) error {
		began := time.Now()
		if err := f(); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		took := time.Since(began)
		own.Parts = append(own.Parts, Part{name, took})
		own.Downtime += took
		return nil
	}
	s := settings{capabilities: []string{"x-ignore-shared"}}
	if err := errors.Join(s.apply(ctx, u.source), s.apply(ctx, destination)); err != nil {
		return Own{}, err
	}
	if err := step("stop", func() error { return u.source.Run(ctx, "stop", nil, nil) }); err != nil {
		return Own{}, err
	}
	if err := copyMemory(u.place().memory, u.next().memory); err != nil {
		return Own{}, err
	}
	var sent func() error
	if err := step("save and load", func() (err error) { sent, err = u.migrate(ctx, destination); return err }); err != nil {
		return Own{}, err
	}
	err := step("cont", func() error { return destination.Run(ctx, "cont", nil, nil) })
	return own, errors.Join(err, sent())
}

// copyMemory copies what is not a hole.
func copyMemory(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("copy memory: %w", err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("copy memory: %w", err)
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	for end := int64(0); ; {
		start, err := in.Seek(end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // holes to the end
		}
		if err != nil {
			return fmt.Errorf("copy memory: %w", err)
		}
		if end, err = in.Seek(start, unix.SEEK_HOLE); err != nil {
			return fmt.Errorf("copy memory: %w", err)
		}
		if _, err := io.Copy(io.NewOffsetWriter(out, start), io.NewSectionReader(in, start, end-start)); err != nil {
			return fmt.Errorf("copy memory: %w", err)
		}
	}
}
