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

// travelStopped shows what QEMU itself needs at the least: the guest is stopped,
// its memory is copied, which is not charged, its device state alone is saved and
// loaded, and it goes on. By its own account its downtime is the sum of what
// QEMU does.
func travelStopped(ctx context.Context, u *unmanaged, destination *qemu.Observer) (Own, error) {
	var own Own
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
	if err := errors.Join(prepare(ctx, u.source, true, nil), prepare(ctx, destination, true, nil)); err != nil {
		return Own{}, err
	}
	if err := step("stop", func() error { return u.source.Run(ctx, "stop", nil, nil) }); err != nil {
		return Own{}, err
	}
	began := time.Now()
	if err := copyMemory(u.place().memory, u.placeAt(otherHost(u.at)).memory); err != nil {
		return Own{}, err
	}
	own.Apart = time.Since(began)
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
