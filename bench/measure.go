package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/flat"
	"github.com/lmctl/lmctl/internal/sys"
)

// Sample is one migration, as seen from outside.
type Sample struct {
	Run         int       `json:"run"` // from 1
	Started     time.Time `json:"started"`
	Source      string    `json:"source"`
	Destination string    `json:"destination"`
	// After is the contender that has moved the guest before; empty for none.
	// Guests differ by it: QEMU's pre-copy looks at every page of both copies,
	// which makes all of the memory file exist, and its next takes longer.
	After string `json:"after,omitempty"`
	// Downtime is the longest time in which the guest's clock did not go on,
	// without what is not the contender's (Own.Apart).
	Downtime time.Duration `json:"downtime_ns"`
	Seen     time.Duration `json:"seen_ns"` // with it
	// Switchover is the longest such time after which the guest went on at the
	// other host. Where the downtime is longer, the guest was kept waiting at
	// another moment.
	Switchover time.Duration `json:"switchover_ns"`
	// Since is when that time began, from the command on.
	Since time.Duration `json:"since_ns"`
	// Quiet is the longest such time just before, without a migration.
	Quiet time.Duration `json:"quiet_ns"`
	// Late is by how much the machine may have lengthened the downtime: the
	// longest time between two looks at the clock.
	Late  time.Duration `json:"late_ns"`
	Total time.Duration `json:"total_ns"` // from the command until the source is free
	Bytes int64         `json:"bytes"`    // sent by the source's network interface
	Own   Own           `json:"own"`
	// Error is why the migration failed; then nothing above but Started was
	// measured.
	Error   string `json:"error,omitempty"`
	Healthy bool   `json:"healthy"`
	Problem string `json:"problem,omitempty"` // why it is not
}

const (
	// quietTime is how long a guest is watched before its migration.
	quietTime = 300 * time.Millisecond
	// settleTime is how long it is watched afterwards.
	settleTime = 300 * time.Millisecond
)

// measure has a contender move a guest, and watches it from outside.
func (b *bed) measure(ctx context.Context, s subject, c Contender, counter int64) (sample Sample, err error) {
	from := s.place()
	to, memory := s.next()
	sample = Sample{Started: time.Now(), Source: from.host, Destination: to}
	probe := flat.NewProbe(flat.DefaultInterval)
	defer func() { err = errors.Join(err, probe.Close()) }()
	if err := probe.Add(from.memory, counter); err != nil {
		return sample, err
	}
	if sample.Quiet, err = watchQuiet(ctx, probe); err != nil {
		return sample, err
	}
	pidfd, err := sys.OpenPidfd(from.pid)
	if err != nil {
		return sample, fmt.Errorf("bench: process %d of the guest: %w", from.pid, err)
	}
	defer func() { err = errors.Join(err, unix.Close(pidfd)) }()

	ctx, cancel := context.WithTimeout(ctx, c.keeper.limit)
	defer cancel()
	arrival, err := expect(memory)
	if err != nil {
		return sample, err
	}
	watching := make(chan error, 1)
	go func() { watching <- arrival.add(ctx, probe, counter) }()
	sent, _, err := b.lab.Traffic(from.host)
	if err != nil {
		return sample, errors.Join(err, stopWatching(cancel, watching))
	}
	began := time.Now()
	own, err := s.move(ctx, c)
	if err == nil {
		err = sys.WaitPidfd(ctx, pidfd)
	}
	sample.Total = time.Since(began)
	if err != nil {
		return sample, errors.Join(&moveError{err}, stopWatching(cancel, watching))
	}
	if err := <-watching; err != nil {
		return sample, err
	}
	now, _, err := b.lab.Traffic(from.host)
	if err != nil {
		return sample, err
	}
	sample.Bytes = int64(now - sent)
	if sample.Own, err = own(ctx); err != nil {
		return sample, err
	}
	if err := awaitTick(ctx, s.place().memory, counter); err != nil {
		return sample, &moveError{err}
	}
	if err := sleep(ctx, settleTime); err != nil {
		return sample, err
	}
	gap := probe.Longest()
	sample.Seen, sample.Since, sample.Late = gap.Length, gap.Start.Sub(began), probe.Lateness()
	sample.Downtime, sample.Switchover = sample.Seen-sample.Own.Apart, probe.Switchover().Length-sample.Own.Apart
	return sample, nil
}

// moveError is a migration that failed, which is a result, while all else that
// fails ends the bench.
type moveError struct{ err error }

func (e *moveError) Error() string { return e.err.Error() }
func (e *moveError) Unwrap() error { return e.err }

// stopWatching ends the wait for a memory file that may never come.
func stopWatching(cancel context.CancelFunc, watching <-chan error) error {
	cancel()
	if err := <-watching; !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// watchQuiet returns the longest gap of a guest that is left alone. From its
// return on the probe knows of every gap.
func watchQuiet(ctx context.Context, probe *flat.Probe) (time.Duration, error) {
	if err := awaitMoving(ctx, probe); err != nil {
		return 0, err
	}
	probe.Reset()
	if err := sleep(ctx, quietTime); err != nil {
		return 0, err
	}
	quiet := probe.Longest().Length
	probe.Reset()
	return quiet, awaitMoving(ctx, probe)
}

// tickPoll is how often a memory file is looked at for a sign of life, of which
// nobody tells.
const tickPoll = time.Millisecond

func awaitMoving(ctx context.Context, probe *flat.Probe) error {
	return still(poll(ctx, func() (bool, error) { return probe.Moving(), nil }))
}

// awaitTick waits until the guest that has this memory goes on.
func awaitTick(ctx context.Context, memory string, counter int64) (err error) {
	f, err := os.Open(memory)
	if err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var first, now [4]byte
	if _, err := f.ReadAt(first[:], counter); err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	return still(poll(ctx, func() (bool, error) {
		_, err := f.ReadAt(now[:], counter)
		return now != first, err
	}))
}

// still says what a wait for the guest's clock that came to nothing means.
func still(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("bench: the guest's clock stands still: %w", err)
}

// poll looks until it is done or patience is at its end.
func poll(ctx context.Context, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(tickPoll)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// sleep lets measured time pass.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// oneLine makes an error fit for a table or a line of progress.
func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }
