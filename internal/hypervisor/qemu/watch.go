package qemu

import (
	"context"
	"sync"
)

// Watch sends what becomes of the guests of this host: an Info for each change
// of state, in order and without gaps, and one with the state removed for a
// guest that is no longer here. It begins with every guest as it is. The
// channel is closed when ctx ends or the driver is closed.
func (d *Driver) Watch(ctx context.Context) <-chan Info {
	out := make(chan Info)
	w := &watcher{wake: make(chan struct{}, 1), over: make(chan struct{})}
	d.mu.Lock()
	for _, v := range d.guests {
		w.add(v.info())
	}
	d.watchers[w] = struct{}{}
	d.mu.Unlock()
	go func() {
		defer close(out)
		defer func() {
			d.mu.Lock()
			delete(d.watchers, w)
			d.mu.Unlock()
		}()
		w.deliver(ctx, out)
	}()
	return out
}

// StateRemoved is seen by watchers only: the guest is no longer on this host.
const StateRemoved State = "removed"

// watcher is an unbounded queue, so that a slow reader holds up no guest.
type watcher struct {
	wake chan struct{}
	over chan struct{}
	once sync.Once

	mu    sync.Mutex
	queue []Info
}

func (w *watcher) end() { w.once.Do(func() { close(w.over) }) }

func (w *watcher) add(i Info) {
	w.mu.Lock()
	w.queue = append(w.queue, i)
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *watcher) take() (Info, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.queue) == 0 {
		return Info{}, false
	}
	i := w.queue[0]
	w.queue = w.queue[1:]
	return i, true
}

func (w *watcher) deliver(ctx context.Context, out chan<- Info) {
	for {
		i, ok := w.take()
		if !ok {
			select {
			case <-w.wake:
				continue
			case <-ctx.Done():
				return
			case <-w.over:
				return
			}
		}
		select {
		case out <- i:
		case <-ctx.Done():
			return
		case <-w.over:
			return
		}
	}
}

// tell sends a guest's snapshot to the watchers.
func (d *Driver) tell(i Info) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for w := range d.watchers {
		w.add(i)
	}
}
