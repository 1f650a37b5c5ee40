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

// settle ends QEMU's migration if one is under way and waits until it is over,
// whatever comes of it. Nobody may read the stream any more: a migration that
// QEMU may have been told to complete ends by failing to write, not by a
// cancellation. That takes up to 100 ms more, QEMU's rate limit, which one that
// was surely not told is spared.
//
// For QEMU 7.2 lets a migrate_cancel in between its looking at the state and
// its inactivating the disks. Such a guest goes on with disks that nobody
// activates: its next write, or its next migration, fails an assertion and ends
// it. A completion whose stream is broken activates them before the guest goes
// on.
func settle(ctx context.Context, mon *monitor, told bool) error {
	sub := mon.subscribe()
	defer sub.close()
	for before := ""; ; {
		status, err := queryMigrate(ctx, mon)
		if err != nil || status.over() {
			return err
		}
		// The first of two looks at the same state acts; what has not changed a
		// while after that is nudged.
		if err := end(ctx, mon, status.Status, told, status.Status == before); err != nil {
			return err
		}
		before = status.Status
		recheck, cancel := context.WithTimeout(ctx, recheckEvery)
		_, err = sub.next(recheck)
		cancel()
		if err != nil && (ctx.Err() != nil || errors.Is(err, errMonitorClosed)) {
			return fmt.Errorf("QEMU's migration stays %s: %w", status.Status, err)
		}
	}
}

// end does what brings a migration in a state nearer to its end.
func end(ctx context.Context, mon *monitor, status string, told, again bool) error {
	var err error
	switch {
	case status == "pre-switchover" && told:
		err = mon.run(ctx, "migrate-continue", object{"state": status}, nil)
	case status == "cancelling" && again:
		// QEMU 7.2 looks whether it was cancelled, lets go of its lock, and then
		// waits to be told to continue: a cancellation in between wakes nobody,
		// and the guest would stand still for ever. migrate-continue wakes the
		// thread in any state that it is told rightly, and one time too many
		// does no harm.
		err = mon.run(ctx, "migrate-continue", object{"state": status}, nil)
	case status == "setup" || status == "active" || status == "pre-switchover":
		// Nobody tells it to leave pre-switchover, so that the cancellation comes
		// before any inactivation.
		return mon.run(ctx, "migrate_cancel", nil, nil)
	}
	if errors.As(err, new(*commandError)) {
		return nil // it is in another state by now
	}
	return err
}
