package migrate

import (
	"context"
	"time"

	"golang.org/x/time/rate"
)

// newLimiter limits to so many bytes a second. What may be sent at once is a
// twentieth of a second's worth: smooth enough for whoever shares the network.
func newLimiter(bandwidth int64) *rate.Limiter {
	burst := int(max(bandwidth/20, 4<<10))
	l := rate.NewLimiter(rate.Limit(bandwidth), burst)
	l.AllowN(time.Now(), burst) // nothing is saved up for the start
	return l
}

// pay waits until the limit has room for bytes that were sent, and returns how
// long that took. Sent first and paid after, zero pages cost what they are.
func pay(ctx context.Context, l *rate.Limiter, bytes int64) (waited time.Duration, err error) {
	begin := time.Now()
	for bytes > 0 {
		n := min(bytes, int64(l.Burst()))
		// Not Wait: that fails at once when the deadline is too near, in words
		// that tell a user nothing.
		timer := time.NewTimer(l.ReserveN(time.Now(), int(n)).Delay())
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return time.Since(begin), context.Cause(ctx)
		}
		bytes -= n
	}
	return time.Since(begin), nil
}
