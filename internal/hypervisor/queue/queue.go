// Package queue has a queue without a bound, for what happens to guests: nobody
// who tells of it waits for those who listen.
package queue

import (
	"context"
	"sync"
)

// Queue hands items over in their order. Any number may put, one may take.
type Queue[T any] struct {
	mu     sync.Mutex
	items  []T
	closed bool
	wake   chan struct{}
}

// New makes an empty queue.
func New[T any]() *Queue[T] { return &Queue[T]{wake: make(chan struct{}, 1)} }

// Put adds an item. It does nothing to a queue that is closed.
func (q *Queue[T]) Put(item T) {
	q.mu.Lock()
	if !q.closed {
		q.items = append(q.items, item)
	}
	q.mu.Unlock()
	q.signal()
}

// Close ends the queue once it is empty.
func (q *Queue[T]) Close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.signal()
}

func (q *Queue[T]) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// Woken receives when there may be something to take.
func (q *Queue[T]) Woken() <-chan struct{} { return q.wake }

// Take returns the next item, if there is one already, and else whether the
// queue is closed.
func (q *Queue[T]) Take() (item T, ok, closed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.items) == 0 {
		return item, false, q.closed
	}
	item = q.items[0]
	q.items = q.items[1:]
	return item, true, false
}

// All calls do with each item until the queue is closed or ctx ends.
func (q *Queue[T]) All(ctx context.Context, do func(T)) {
	for {
		item, ok, closed := q.Take()
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
