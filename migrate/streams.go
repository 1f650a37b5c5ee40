package migrate

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/lmctl/lmctl/dirtymap"
)

// streams are the source's data connections.
type streams struct {
	conns  []net.Conn
	out    []*bufio.Writer
	mem    blocks
	limit  *rate.Limiter // nil for none
	copied atomic.Int64  // pages handled in the pass under way
	sent   atomic.Int64  // bytes, over all passes
}

// writeBuffer is large enough that scattered pages share system calls and TLS
// records, and small enough to stay in the cache.
const writeBuffer = 128 << 10

func openStreams(ctx context.Context, dial func(context.Context) (net.Conn, error), p preamble, n int, mem blocks, bandwidth int64) (*streams, error) {
	s := &streams{mem: mem}
	if bandwidth > 0 {
		s.limit = newLimiter(bandwidth)
	}
	for i := range n {
		conn, err := dial(ctx)
		if err != nil {
			s.close()
			return nil, fmt.Errorf("open data stream %d: %w", i, err)
		}
		s.conns = append(s.conns, conn)
		s.out = append(s.out, bufio.NewWriterSize(conn, writeBuffer))
		p.role, p.index = roleData, uint16(i)
		if _, err := conn.Write(p.append(nil)); err != nil {
			s.close()
			return nil, fmt.Errorf("open data stream %d: %w", i, err)
		}
	}
	return s, nil
}

func (s *streams) close() {
	for _, c := range s.conns {
		c.Close()
	}
}

// tally counts what one pass sent.
type tally struct {
	pages, zero, bytes int64
	limited            time.Duration // waited for the bandwidth limit, per stream
}

func (t *tally) add(o tally) {
	t.pages += o.pages
	t.zero += o.zero
	t.bytes += o.bytes
	t.limited += o.limited
}

// send sends the pages set in maps as one pass and ends it on each stream. A
// live pass obeys the bandwidth limit.
func (s *streams) send(ctx context.Context, pass int, maps []*dirtymap.Bitmap, live bool) (tally, error) {
	q := newQueue(maps, maxRunPages)
	return s.each(ctx, pass, func(ctx context.Context, w *bufio.Writer, t *tally) error {
		var b batch
		for q.take(&b) {
			for _, task := range b.tasks[:b.n] {
				before := t.bytes
				if err := s.sendRun(w, pass, task, t); err != nil {
					return err
				}
				s.copied.Add(int64(task.pages))
				if live && s.limit != nil {
					waited, err := pay(ctx, s.limit, t.bytes-before)
					if t.limited += waited; err != nil {
						return err
					}
				}
			}
			if err := ctx.Err(); err != nil {
				return err
			}
		}
		return nil
	})
}

// each runs fn on every stream, guarded, then ends the pass there.
func (s *streams) each(ctx context.Context, pass int, fn func(context.Context, *bufio.Writer, *tally) error) (tally, error) {
	tallies := make([]tally, len(s.out))
	g, ctx := errgroup.WithContext(ctx)
	for i, w := range s.out {
		t := &tallies[i]
		g.Go(func() error {
			err := guarded("read guest memory", func() error { return fn(ctx, w, t) })
			if err == nil {
				err = s.frame(w, dataHeader{typ: dataEnd, pass: uint32(pass)}, nil, t)
			}
			if err == nil {
				err = w.Flush()
			}
			if err != nil {
				return fmt.Errorf("data stream %d: %w", i, err)
			}
			return nil
		})
	}
	err := g.Wait()
	var sum tally
	for _, t := range tallies {
		sum.add(t)
	}
	sum.limited /= time.Duration(len(tallies))
	return sum, err
}

// sendRun sends a run of pages, its zero pages as a few bytes.
func (s *streams) sendRun(w *bufio.Writer, pass int, r task, t *tally) error {
	b := s.mem[r.block]
	for first, end := r.first, r.first+r.pages; first < end; {
		zero := isZero(b.run(first, 1))
		n := 1
		for first+n < end && isZero(b.run(first+n, 1)) == zero {
			n++
		}
		h := dataHeader{typ: dataPages, block: uint16(r.block), pages: uint32(n), first: uint64(first), pass: uint32(pass)}
		var payload []byte
		if zero {
			h.typ = dataZero
			t.zero += int64(n)
		} else {
			payload = b.run(first, n)
		}
		if err := s.frame(w, h, payload, t); err != nil {
			return err
		}
		t.pages += int64(n)
		first += n
	}
	return nil
}

func (s *streams) frame(w *bufio.Writer, h dataHeader, payload []byte, t *tally) error {
	h.length = uint32(len(payload))
	// The header is built in the writer's own buffer: on the stack it would
	// escape through the interface, once a frame.
	if w.Available() < dataHdrSize {
		if err := w.Flush(); err != nil {
			return err
		}
	}
	hdr := w.AvailableBuffer()[:dataHdrSize]
	h.put(hdr)
	if _, err := w.Write(hdr); err != nil {
		return err
	}
	if _, err := w.Write(payload); err != nil {
		return err
	}
	n := int64(dataHdrSize + len(payload))
	t.bytes += n
	s.sent.Add(n)
	return nil
}

// sendHashes sends a hash of every page of guest memory, and of holes and zero
// pages only where they are.
func (s *streams) sendHashes(ctx context.Context, pass int) (tally, error) {
	present := s.mem.bitmaps()
	if err := s.mem.present(present); err != nil {
		return tally{}, err
	}
	holes := s.mem.bitmaps()
	for i, b := range s.mem {
		holes[i].SetRange(0, b.pages)
		holes[i].Subtract(present[i])
	}
	data, empty := newQueue(present, maxHashes), newQueue(holes, int(^uint32(0)>>1))
	return s.each(ctx, pass, func(ctx context.Context, w *bufio.Writer, t *tally) error {
		var b batch
		hashes := make([]byte, 0, maxHashes*8)
		for data.take(&b) {
			for _, r := range b.tasks[:b.n] {
				hashes = hashes[:0]
				for p := r.first; p < r.first+r.pages; p++ {
					hashes = binary.BigEndian.AppendUint64(hashes, xxhash.Sum64(s.mem[r.block].run(p, 1)))
				}
				if err := s.hashFrame(w, dataHashes, pass, r, hashes, t); err != nil {
					return err
				}
			}
			if err := ctx.Err(); err != nil {
				return err
			}
		}
		for empty.take(&b) {
			for _, r := range b.tasks[:b.n] {
				if err := s.hashFrame(w, dataZeroHashes, pass, r, nil, t); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func (s *streams) hashFrame(w *bufio.Writer, typ dataType, pass int, r task, hashes []byte, t *tally) error {
	h := dataHeader{typ: typ, block: uint16(r.block), pages: uint32(r.pages), first: uint64(r.first), pass: uint32(pass)}
	t.pages += int64(r.pages)
	return s.frame(w, h, hashes, t)
}
