package nics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/migrate/announce"
)

// Caught is what comes for the cards of a guest that stands still.
type Caught struct{ stranded []*announce.Stranded }

// Catch begins to keep what comes for the cards. A card on which that fails
// loses what comes during the pause, as a link would that was pulled for as
// long; the migration goes on.
func Catch(log *slog.Logger, guest string, cards []announce.NIC) *Caught {
	c := &Caught{}
	for _, card := range cards {
		s, err := announce.OpenStranded(card)
		if err != nil {
			log.Warn("what comes for the guest while it stands still will be lost", "guest", guest, "card", card.MAC, "error", err)
			continue
		}
		c.stranded = append(c.stranded, s)
	}
	return c
}

// Stopped says from when on the guest has received nothing.
func (c *Caught) Stopped(at time.Time) {
	if c == nil {
		return
	}
	for _, s := range c.stranded {
		s.Stopped(at)
	}
}

// Close ends what Catch began.
func (c *Caught) Close() error {
	if c == nil {
		return nil
	}
	var errs []error
	for _, s := range c.stranded {
		errs = append(errs, s.Close())
	}
	c.stranded = nil
	return errors.Join(errs...)
}

// Forward sends the frames on that came, and those that still come until ctx is
// done, and returns how many. Pid and pidfd are the hypervisor's process, which
// still has the taps.
func (c *Caught) Forward(ctx context.Context, pid, pidfd int) (int, error) {
	if c == nil {
		return 0, nil
	}
	type outcome struct {
		frames int
		err    error
	}
	results := make(chan outcome)
	for _, s := range c.stranded {
		go func() {
			unread := unread(s, pid, pidfd)
			n, err := s.Forward(ctx)
			err = errors.Join(unread, err)
			if d := s.Dropped(); err == nil && d > 0 {
				err = fmt.Errorf("%d frames could not be sent", d)
			}
			results <- outcome{n, err}
		}()
	}
	frames, errs := 0, []error(nil)
	for range c.stranded {
		r := <-results
		frames += r.frames
		errs = append(errs, r.err)
	}
	return frames, errors.Join(errs...)
}

// unread has those frames sent on too that the hypervisor left in its tap before
// the stop.
func unread(s *announce.Stranded, pid, pidfd int) (err error) {
	theirs, err := announce.TapFDs(pid, s.Tap())
	if err != nil {
		return err
	}
	var ours []int
	defer func() {
		for _, fd := range ours {
			err = errors.Join(err, unix.Close(fd))
		}
	}()
	for _, fd := range theirs {
		dup, err := unix.PidfdGetfd(pidfd, fd, 0)
		if err != nil {
			return fmt.Errorf("duplicate descriptor %d of QEMU: %w", fd, err)
		}
		ours = append(ours, dup)
	}
	return s.Unread(ours...)
}
