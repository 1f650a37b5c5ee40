package qemu

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// migrationStatus is QEMU's account of its current or last migration.
type migrationStatus struct {
	Status  string   `json:"status"` // empty if there never was one
	Error   string   `json:"error-desc"`
	Blocked []string `json:"blocked-reasons"`
}

// over says whether QEMU has done with the migration, whatever came of it.
func (s migrationStatus) over() bool {
	switch s.Status {
	case "", "none", "completed", "failed", "cancelled":
		return true
	}
	return false
}

func (g *Guest) queryMigrate(ctx context.Context) (migrationStatus, error) {
	return queryMigrate(ctx, g.v.monitor(g.inst))
}

func queryMigrate(ctx context.Context, mon *monitor) (migrationStatus, error) {
	var status migrationStatus
	err := mon.run(ctx, "query-migrate", nil, &status)
	return status, err
}

// errMigrationFailed is QEMU's own failure.
var errMigrationFailed = errors.New("QEMU's migration failed")

// failure words a migration that ended otherwise than it should.
func failure(ctx context.Context, mon *monitor, status string) error {
	said, err := queryMigrate(ctx, mon)
	if err == nil && said.Error != "" {
		return fmt.Errorf("%w (%s): %s", errMigrationFailed, status, said.Error)
	}
	return fmt.Errorf("%w (%s)", errMigrationFailed, status)
}

// recheckEvery is how often a status is asked for in case its event is lost: a
// guest may stand still meanwhile.
const recheckEvery = 200 * time.Millisecond

// settle cancels QEMU's migration if one is under way and waits until it is
// over, whatever comes of it.
func settle(ctx context.Context, mon *monitor) (migrationStatus, error) {
	sub := mon.subscribe()
	defer sub.close()
	status, err := queryMigrate(ctx, mon)
	if err != nil || status.over() {
		return status, err
	}
	if err := mon.run(ctx, "migrate_cancel", nil, nil); err != nil {
		return status, err
	}
	for {
		if status, err = queryMigrate(ctx, mon); err != nil || status.over() {
			return status, err
		}
		recheck, cancel := context.WithTimeout(ctx, recheckEvery)
		_, err = sub.next(recheck)
		cancel()
		switch {
		case err == nil:
		case ctx.Err() != nil || errors.Is(err, errMonitorClosed):
			return status, fmt.Errorf("QEMU's migration stays %s: %w", status.Status, err)
		case status.Status == "cancelling":
			if err := unblock(ctx, mon); err != nil {
				return status, err
			}
		}
	}
}

// unblock wakes a migration thread that sleeps through its cancellation. QEMU
// 7.2 looks whether it was cancelled, lets go of its lock, and then waits to be
// told to continue: a cancellation in between wakes nobody, and the guest would
// stand still for ever. migrate-continue wakes the thread in any state that it
// is told rightly, and one time too many does no harm.
func unblock(ctx context.Context, mon *monitor) error {
	err := mon.run(ctx, "migrate-continue", object{"state": "cancelling"}, nil)
	if errors.As(err, new(*commandError)) {
		return nil // it is no longer cancelling
	}
	return err
}
