package e2e

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/lmctl/lmctl/internal/hypervisor/qemu"
)

// runningWatch follows every QEMU of a guest, on both hosts, by its observer
// socket, and notes when its vCPUs ran.
type runningWatch struct {
	t      *testing.T
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu   sync.Mutex
	runs []run
}

// run is a time in which a copy's vCPUs ran; a zero end means that they do.
type run struct {
	host       string
	began, end time.Time
}

func (c *cluster) watchRunning(g *flatGuest) *runningWatch {
	ctx, cancel := context.WithCancel(context.Background())
	w := &runningWatch{t: c.T, cancel: cancel}
	for _, host := range c.Lab.Hosts() {
		socket := filepath.Join(c.Lab.RunDir(host), "guests", g.name, "observer.sock")
		w.wg.Add(1)
		go func() {
			defer w.wg.Done()
			for ctx.Err() == nil {
				w.follow(ctx, host, socket)
			}
		}()
	}
	c.T.Cleanup(w.stop)
	// The guest runs: a watch that has not seen that has not begun.
	c.Eventually("the watch sees the guest run", func() error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.runs) == 0 {
			return errors.New("no copy is seen running")
		}
		return nil
	})
	return w
}

func (w *runningWatch) stop() { w.cancel(); w.wg.Wait() }

// follow watches one QEMU from its observer socket's appearance to its end.
func (w *runningWatch) follow(ctx context.Context, host, socket string) {
	o, err := qemu.Observe(ctx, socket)
	if err != nil {
		select { // no QEMU there, or not yet
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
		}
		return
	}
	defer o.Close()
	events := o.Events()
	defer events.Close()
	var s struct {
		Status string `json:"status"`
	}
	if o.Run(ctx, "query-status", nil, &s) == nil && s.Status == "running" {
		w.ran(host, time.Now())
	}
	for {
		e, err := events.Next(ctx)
		if err != nil {
			if ctx.Err() == nil {
				w.stopped(host, time.Now())
			}
			return
		}
		at := time.Now()
		if !e.Stamp.IsZero() {
			at = e.Stamp
		}
		switch e.Name {
		case "RESUME":
			w.ran(host, at)
		case "STOP":
			w.stopped(host, at)
		}
	}
}

func (w *runningWatch) ran(host string, at time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range w.runs {
		if r.host == host && r.end.IsZero() {
			return
		}
	}
	w.runs = append(w.runs, run{host: host, began: at})
}

func (w *runningWatch) stopped(host string, at time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range w.runs {
		if r := &w.runs[i]; r.host == host && r.end.IsZero() {
			r.end = at
		}
	}
}

// never2 fails the test if two copies' vCPUs ran at the same time.
func (w *runningWatch) never2() {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, a := range w.runs {
		for _, b := range w.runs[i+1:] {
			if a.host == b.host {
				continue
			}
			if (b.end.IsZero() || a.began.Before(b.end)) && (a.end.IsZero() || b.began.Before(a.end)) {
				w.t.Errorf("two copies ran at once: on %s from %v to %v, on %s from %v to %v", a.host, a.began, a.end, b.host, b.began, b.end)
			}
		}
	}
}
