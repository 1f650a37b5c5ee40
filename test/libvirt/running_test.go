package libvirt

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/lmctl/lmctl/guest/flat"
)

// runningWatch compares the counters that both copies of a flat guest have in
// their memory.
type runningWatch struct {
	m      *cell
	cancel context.CancelFunc
	over   chan struct{}
	err    error // valid then
}

func (m *cell) watch() *runningWatch {
	ctx, cancel := context.WithCancel(context.Background())
	w := &runningWatch{m: m, cancel: cancel, over: make(chan struct{})}
	m.T.Cleanup(cancel)
	go func() {
		defer close(w.over)
		w.err = m.compare(ctx)
	}()
	return w
}

// neverTwice ends the watch, and fails the test if both copies ran.
func (w *runningWatch) neverTwice() {
	w.cancel()
	<-w.over
	if w.err != nil {
		w.m.T.Error(w.err)
	}
}

// compare reads the counters until ctx ends. The destination's is copied from the
// source's: only a copy whose CPUs have run is ahead, and from then on that of
// the source stands still.
func (m *cell) compare(ctx context.Context) error {
	ahead, last := false, uint64(0)
	for ; ctx.Err() == nil; time.Sleep(2 * time.Millisecond) {
		there, err := m.counter("host2")
		here, err2 := m.counter("host1")
		if err != nil || err2 != nil {
			continue // one of them is not there, or not yet
		}
		if ahead && here != last {
			return fmt.Errorf("both copies ran: the source's counter went from %d to %d after the destination's had reached %d", last, here, there)
		}
		if there > here {
			ahead, last = true, here
		}
	}
	return nil
}

// counter is what a host's copy of the guest has counted to.
func (m *cell) counter(host string) (uint64, error) {
	paths, err := filepath.Glob(filepath.Join(m.Lab.MemoryDir(host), "libvirt", "qemu", "*-"+m.guest.Name, "pc.ram"))
	if err != nil || len(paths) != 1 {
		return 0, fmt.Errorf("memory files %q (%v)", paths, err)
	}
	f, err := os.Open(paths[0])
	if err != nil {
		return 0, err
	}
	defer f.Close()
	s, err := flat.ReadState(f)
	return s.Counter, err
}
