package workload

import (
	"context"
	"runtime"
	"time"

	"github.com/lmctl/lmctl/guest/control"
)

// maxBurst is how far a pace may catch up after it was held up.
const maxBurst = 200 * time.Millisecond

// pace calls step so often that rate units a second are done, where a step does
// unit of them. It wakes every tick, or with the first step that is due; it
// sleeps while the rate is 0, and does not pause while it is Unbounded. The
// channel that rate returns is closed when the rate may have changed. pace
// returns when ctx ends.
func pace(ctx context.Context, tick time.Duration, unit int64, rate func() (int64, <-chan struct{}), step func()) {
	for ctx.Err() == nil {
		r, changed := rate()
		switch r {
		case 0:
			select {
			case <-ctx.Done():
			case <-changed:
			}
		case control.Unbounded:
			flatOut(ctx, changed, step)
		default:
			steady(ctx, changed, tick, float64(r)/float64(unit), step)
		}
	}
}

// flatOut steps until ctx ends or the setting changes.
func flatOut(ctx context.Context, changed <-chan struct{}, step func()) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
			return
		default:
		}
		for range 64 {
			step()
		}
		runtime.Gosched()
	}
}

// steady steps perSecond times a second until ctx ends or the setting changes.
func steady(ctx context.Context, changed <-chan struct{}, tick time.Duration, perSecond float64, step func()) {
	tick = max(tick, min(time.Duration(float64(time.Second)/perSecond), 10*time.Second))
	timer := time.NewTicker(tick)
	defer timer.Stop()
	last, owed := time.Now(), 0.0
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
			return
		case <-timer.C:
		}
		now := time.Now()
		owed += min(now.Sub(last), max(maxBurst, 2*tick)).Seconds() * perSecond
		last = now
		// Checked on the way, since what is owed may take long.
		for n := 0; owed >= 1; n++ {
			step()
			owed--
			if n%64 == 63 {
				runtime.Gosched()
				if ctx.Err() != nil || time.Since(now) > maxBurst {
					owed = 0
				}
			}
		}
	}
}
