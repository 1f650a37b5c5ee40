package migrate

import (
	"bufio"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
)

// assembly puts a relayed stream together from the chunks that come over the
// data connections, of which each has its turn. Read is its reader's alone.
type assembly struct {
	queues  []chan []byte // of each connection; closed at its end
	decoder *zstd.Decoder
	quit    chan struct{} // closed by fail

	started chan struct{} // closed by the first chunk
	once    sync.Once

	mu    sync.Mutex
	err   error
	ended time.Time // when all of the stream had been read

	next int    // whose turn it is
	rest []byte // of the chunk being read
}

func newAssembly(streams int) (*assembly, error) {
	decoder, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(maxChunk), zstd.WithDecoderConcurrency(streams))
	if err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	a := &assembly{decoder: decoder, quit: make(chan struct{}), started: make(chan struct{})}
	for range streams {
		a.queues = append(a.queues, make(chan []byte, 2))
	}
	return a, nil
}

// fail ends a Read and a serve that wait.
func (a *assembly) fail(err error) {
	if a == nil {
		return // in direct mode
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err == nil {
		a.err = err
		close(a.quit)
	}
}

func (a *assembly) failure() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

// endedAt is when all of the stream had been read, zero before.
func (a *assembly) endedAt() time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.ended
}

// close lets go of what an assembly holds. Nobody reads or serves any more.
func (a *assembly) close() {
	if a != nil {
		a.decoder.Close()
	}
}

// serve handles one data connection until it ends or breaks the protocol.
func (a *assembly) serve(index int, conn io.Reader) error {
	r := bufio.NewReaderSize(conn, readBuffer)
	for number, ended := uint64(index), false; ; number += uint64(len(a.queues)) {
		var hdr [dataHdrSize]byte
		if _, err := io.ReadFull(r, hdr[:]); err != nil {
			return err
		}
		h, err := parseDataHeader(hdr[:])
		switch {
		case err != nil:
			return err
		case ended:
			return violation("a frame of type %d after the end", h.typ)
		case h.typ == dataEnd && h.pass == 1:
			ended = true
			close(a.queues[index])
			continue
		case h.typ != dataStream:
			return violation("a frame of type %d in relay mode", h.typ)
		case h.first != number:
			return violation("chunk %d where %d is due", h.first, number)
		}
		chunk, err := a.chunk(r, h)
		if err != nil {
			return err
		}
		a.once.Do(func() { close(a.started) })
		select {
		case a.queues[index] <- chunk:
		case <-a.quit:
			return a.failure()
		}
	}
}

// chunk reads a chunk's payload.
func (a *assembly) chunk(r io.Reader, h dataHeader) ([]byte, error) {
	payload := make([]byte, h.length)
	if _, err := io.ReadFull(r, payload); err != nil {
		return nil, err
	}
	if h.enc == plain {
		return payload, nil
	}
	chunk, err := a.decoder.DecodeAll(payload, make([]byte, 0, h.pages))
	if err != nil {
		return nil, violation("chunk %d: %v", h.first, err)
	}
	if len(chunk) != int(h.pages) {
		return nil, violation("chunk %d has %d bytes, and should have %d", h.first, len(chunk), h.pages)
	}
	return chunk, nil
}

// Read implements io.Reader for the one who loads the guest.
func (a *assembly) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if !a.endedAt().IsZero() {
			return 0, io.EOF
		}
		select {
		case chunk, more := <-a.queues[a.next]:
			if !more {
				if err := a.allEnded(); err != nil {
					return 0, err
				}
				continue
			}
			a.rest = chunk
			a.next = (a.next + 1) % len(a.queues)
		case <-a.quit:
			return 0, a.failure()
		}
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// allEnded makes sure that no connection has more than the one whose turn it is
// and that has ended.
func (a *assembly) allEnded() error {
	for i, q := range a.queues {
		select {
		case _, more := <-q:
			if more {
				return violation("data stream %d goes on after the stream's end", i)
			}
		case <-a.quit:
			return a.failure()
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ended = time.Now()
	return nil
}
