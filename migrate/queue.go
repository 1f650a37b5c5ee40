package migrate

import (
	"sync"

	"github.com/lmctl/lmctl/dirtymap"
)

// task is a run of pages for one stream to send.
type task struct {
	block, first, pages int
}

// batch is what a stream takes from the queue at a time: enough that the lock
// costs nothing, little enough that the streams finish together.
type batch struct {
	tasks [64]task
	n     int
}

const batchPages = 512 // 2 MiB

// queue hands out the set pages of bitmaps as runs, in order, to any number of
// streams. It allocates nothing.
type queue struct {
	mu    sync.Mutex
	maps  []*dirtymap.Bitmap
	limit int // pages in a run
	block int
	next  int
}

func newQueue(maps []*dirtymap.Bitmap, limit int) *queue { return &queue{maps: maps, limit: limit} }

// take fills b and reports whether there was anything left.
func (q *queue) take(b *batch) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	b.n = 0
	for total := 0; b.n < len(b.tasks) && total < batchPages && q.block < len(q.maps); {
		first, n, ok := q.maps[q.block].NextRun(q.next)
		if !ok {
			q.block, q.next = q.block+1, 0
			continue
		}
		n = min(n, q.limit)
		b.tasks[b.n] = task{block: q.block, first: first, pages: n}
		b.n, q.next, total = b.n+1, first+n, total+n
	}
	return b.n > 0
}
