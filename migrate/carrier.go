package migrate

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"
)

// carrier sends a hypervisor's stream over the data connections, a chunk on each
// in turn, so that all of them compress and encrypt at the same time. The other
// side is assembly.
type carrier struct {
	s       *streams
	ctx     context.Context
	group   *errgroup.Group
	queues  []chan []byte // one for each connection
	free    chan []byte   // buffers of maxChunk
	encoder *zstd.Encoder // nil for none

	mu    sync.Mutex // of Write and end
	next  uint64     // the next chunk's number
	part  int        // bytes of a page that is not counted as copied yet
	ended bool

	taken atomic.Int64 // bytes of the stream
	// limited says that the bandwidth limit counts: the guest runs.
	limited atomic.Bool
}

// newCarrier begins to send. Whoever ends ctx closes the connections.
func newCarrier(ctx context.Context, s *streams, compress bool) (*carrier, error) {
	c := &carrier{s: s, free: make(chan []byte, 3*len(s.out))}
	c.limited.Store(s.limit != nil)
	if compress {
		var err error
		if c.encoder, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(len(s.out))); err != nil {
			return nil, fmt.Errorf("compress: %w", err)
		}
	}
	for range cap(c.free) {
		c.free <- make([]byte, maxChunk)
	}
	c.group, c.ctx = errgroup.WithContext(ctx)
	for i, w := range s.out {
		queue := make(chan []byte, 1)
		c.queues = append(c.queues, queue)
		c.group.Go(func() error {
			if err := c.send(w, uint64(i), queue); err != nil {
				return fmt.Errorf("data stream %d: %w", i, err)
			}
			return nil
		})
	}
	return c, nil
}

// Write implements io.Writer. It returns once the bytes are on their way.
func (c *carrier) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return 0, errStreamEnded
	}
	for n := 0; n < len(p); {
		var chunk []byte
		select {
		case chunk = <-c.free:
		case <-c.ctx.Done():
			return n, context.Cause(c.ctx)
		}
		size := copy(chunk[:maxChunk], p[n:])
		select {
		case c.queues[c.next%uint64(len(c.queues))] <- chunk[:size]:
		case <-c.ctx.Done():
			return n, context.Cause(c.ctx)
		}
		c.next++
		n += size
		c.taken.Add(int64(size))
		c.part += size
		c.s.copied.Add(int64(c.part / PageSize))
		c.part %= PageSize
		if c.limited.Load() {
			if _, err := pay(c.ctx, c.s.limit, int64(size)); err != nil {
				return n, err
			}
		}
	}
	return len(p), nil
}

var errStreamEnded = errors.New("the stream has ended")

// send sends the chunks of one connection, the first of which has this number.
func (c *carrier) send(w *bufio.Writer, number uint64, queue <-chan []byte) error {
	var packed []byte
	var t tally
	for chunk := range queue {
		h := dataHeader{typ: dataStream, pages: uint32(len(chunk)), first: number, pass: 1}
		payload := chunk
		if c.encoder != nil {
			if packed = c.encoder.EncodeAll(chunk, packed[:0]); len(packed) < len(chunk) {
				h.enc, payload = zstandard, packed
			}
		}
		err := c.s.frame(w, h, payload, &t)
		if err == nil {
			err = w.Flush() // the other side may have to answer
		}
		if err != nil {
			return err
		}
		c.free <- chunk
		number += uint64(len(c.queues))
	}
	if err := c.s.frame(w, dataHeader{typ: dataEnd, pass: 1}, nil, &t); err != nil {
		return err
	}
	return w.Flush()
}

// end sends what is under way and says that this was all.
func (c *carrier) end() error {
	c.mu.Lock()
	if !c.ended {
		c.ended = true
		for _, q := range c.queues {
			close(q)
		}
	}
	c.mu.Unlock()
	return c.group.Wait()
}

// close ends the sending wherever it is. The context has ended, or all is sent.
func (c *carrier) close() {
	if c == nil {
		return
	}
	_ = c.end() // what was not sent is not wanted
	if c.encoder != nil {
		_ = c.encoder.Close() // of a nil writer
	}
}
