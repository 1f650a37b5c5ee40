package libvirt

import (
	"context"
	"sync"
)

// queue hands over what happens in its order, without holding up whoever it
// happens to.
type queue[T any] struct {
	mu     sync.Mutex
	items  []T
	closed bool
	wake   chan struct{}
}

func newQueue[T any]() *queue[T] { return &queue[T]{wake: make(chan struct{}, 1)} }

// put adds an item. It does nothing to a queue that is closed.
func (q *queue[T]) put(item T) {
	q.mu.Lock()
	if !q.closed {
		q.items = append(q.items, item)
	}
	q.mu.Unlock()
	q.signal()
}

// close ends the queue once it is empty.
func (q *queue[T]) close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.signal()
}

func (q *queue[T]) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// take returns the next item, if there is one already.
func (q *queue[T]) take() (item T, ok, closed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.items) == 0 {
		return item, false, q.closed
	}
	item = q.items[0]
	q.items = q.items[1:]
	return item, true, false
}

// all calls do with each item until the queue is closed or ctx ends. One reader
// at a time.
func (q *queue[T]) all(ctx context.Context, do func(T)) {
	for {
		item, ok, closed := q.take()
		switch {
		case ok:
			do(item)
			continue
		case closed:
			return
		}
		select {
		case <-q.wake:
		case <-ctx.Done():
			return
		}
	}
}
