package hypervisor

import (
	"context"
	"sync"

	"github.com/lmctl/lmctl/internal/hypervisor/queue"
)

// Watchers are those who watch a driver's guests. The zero value has none.
type Watchers struct {
	mu     sync.Mutex
	all    map[*queue.Queue[Info]]context.CancelFunc
	closed bool
}

// Watch is Driver's, given what lists the guests as they are. That must not
// wait for anybody who is in Tell.
func (ws *Watchers) Watch(ctx context.Context, list func() []Info) <-chan Info {
	out := make(chan Info)
	ctx, cancel := context.WithCancel(ctx)
	q := queue.New[Info]()
	ws.mu.Lock()
	for _, i := range list() {
		q.Put(i)
	}
	if ws.closed {
		cancel()
	}
	if ws.all == nil {
		ws.all = make(map[*queue.Queue[Info]]context.CancelFunc)
	}
	ws.all[q] = cancel
	ws.mu.Unlock()
	go func() {
		defer close(out)
		defer func() {
			cancel()
			ws.mu.Lock()
			delete(ws.all, q)
			ws.mu.Unlock()
		}()
		q.All(ctx, func(i Info) {
			select {
			case out <- i:
			case <-ctx.Done():
			}
		})
	}()
	return out
}

// Tell sends a guest's snapshot to the watchers. Those of one guest are told in
// the order of its changes, which the caller sees to.
func (ws *Watchers) Tell(i Info) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for q := range ws.all {
		q.Put(i)
	}
}

// Close ends every watcher's channel.
func (ws *Watchers) Close() {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	ws.closed = true
	for _, cancel := range ws.all {
		cancel()
	}
}
