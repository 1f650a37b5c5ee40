package migrate

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestPay takes the time that the limit asks for, by the test's own clock.
func TestPay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter(1 << 20)
		begin := time.Now()
		for range 16 {
			if _, err := pay(t.Context(), l, 256<<10); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(begin); took < 3900*time.Millisecond || took > 4100*time.Millisecond {
			t.Errorf("4 MiB at 1 MiB/s took %v", took)
		}
	})
}

func TestPayEndsWithTheWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		late := errors.New("not done within 3s")
		ctx, cancel := context.WithTimeoutCause(t.Context(), 3*time.Second, late)
		defer cancel()
		begin := time.Now()
		waited, err := pay(ctx, newLimiter(1), 1<<20)
		if !errors.Is(err, late) || time.Since(begin) != 3*time.Second || waited != 3*time.Second {
			t.Errorf("ended after %v with %v", waited, err)
		}
	})
}
