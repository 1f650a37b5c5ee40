package hypervisor

import (
	"context"
	"sync"
)

// Watchers are those who watch a driver's guests. The zero value has none.
type Watchers struct {
	mu     sync.Mutex
	all    map[*watcher]struct{}
	closed bool
}

// Watch is Driver's, given what lists the guests as they are. That must not
// wait for anybody who is in Tell.
func (ws *Watchers) Watch(ctx context.Context, list func() []Info) <-chan Info {
	out := make(chan Info)
	w := &watcher{wake: make(chan struct{}, 1), over: make(chan struct{})}
	ws.mu.Lock()
	for _, i := range list() {
		w.add(i)
	}
	if ws.closed {
		w.end()
	}
	if ws.all == nil {
		ws.all = make(map[*watcher]struct{})
	}
	ws.all[w] = struct{}{}
	ws.mu.Unlock()
	go func() {
		defer close(out)
		defer func() {
			ws.mu.Lock()
			delete(ws.all, w)
			ws.mu.Unlock()
		}()
		w.deliver(ctx, out)
	}()
	return out
}

// Tell sends a guest's snapshot to the watchers. Those of one guest are told in
// the order of its changes, which the caller sees to.
func (ws *Watchers) Tell(i Info) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for w := range ws.all {
		w.add(i)
	}
}

// Close ends every watcher's channel.
func (ws *Watchers) Close() {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	ws.closed = true
	for w := range ws.all {
		w.end()
	}
}

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
