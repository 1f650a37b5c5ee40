package migrate

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// control is one side of a control connection. Send may be called from any
// goroutine; Recv from one.
type control struct {
	conn    net.Conn
	timeout time.Duration // the peer timeout
	r       *bufio.Reader
	body    []byte // Recv's buffer for state frames

	mu   sync.Mutex // guards writes
	buf  []byte
	last time.Time // of the last write

	sent atomic.Int64 // bytes

	stop chan struct{}
	done sync.WaitGroup
}

// newControl starts to keep the connection alive; close ends that.
func newControl(conn net.Conn, timeout time.Duration) *control {
	c := &control{conn: conn, timeout: timeout, r: bufio.NewReader(conn), stop: make(chan struct{})}
	c.done.Add(1)
	go c.keepAlive()
	return c
}

// close ends the connection and the goroutine that kept it alive. It may be
// called more than once, by one goroutine.
func (c *control) close() {
	select {
	case <-c.stop:
	default:
		close(c.stop)
	}
	c.conn.Close()
	c.done.Wait()
}

func (c *control) keepAlive() {
	defer c.done.Done()
	tick := time.NewTicker(c.timeout / 4)
	defer tick.Stop()
	for {
		select {
		case <-c.stop:
			return
		case <-tick.C:
			c.mu.Lock()
			idle := time.Since(c.last) >= c.timeout/8
			c.mu.Unlock()
			// A write that fails is noticed by Recv, which then fails too.
			if idle && c.raw(ctlPing, nil) != nil {
				return
			}
		}
	}
}

// raw sends one frame with an encoded body.
func (c *control) raw(t controlType, body []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buf = append(appendControlHeader(c.buf[:0], t, len(body)), body...)
	c.last = time.Now()
	if err := c.conn.SetWriteDeadline(c.last.Add(c.timeout)); err != nil {
		return fmt.Errorf("send %v: %w", t, err)
	}
	n, err := c.conn.Write(c.buf)
	c.sent.Add(int64(n))
	if err != nil {
		return fmt.Errorf("send %v: %w", t, err)
	}
	return nil
}

// send sends one frame whose body is m in JSON, or empty for a nil m.
func (c *control) send(t controlType, m any) error {
	var body []byte
	if m != nil {
		var err error
		if body, err = json.Marshal(m); err != nil {
			return fmt.Errorf("send %v: %w", t, err)
		}
	}
	if len(body) > maxControlBody {
		return fmt.Errorf("send %v: body of %d bytes, at most %d", t, len(body), maxControlBody)
	}
	return c.raw(t, body)
}

// recv returns the next frame that is not a ping. The body is valid until the
// next call. It fails when the peer has been silent for the peer timeout.
func (c *control) recv() (controlType, []byte, error) { return c.recvBefore(time.Time{}) }

// recvBefore is recv with a deadline that pings do not put off; zero is none.
func (c *control) recvBefore(deadline time.Time) (controlType, []byte, error) {
	for {
		next := time.Now().Add(c.timeout)
		if !deadline.IsZero() && deadline.Before(next) {
			next = deadline
		}
		if err := c.conn.SetReadDeadline(next); err != nil {
			return 0, nil, err
		}
		var hdr [controlHdrSize]byte
		if _, err := io.ReadFull(c.r, hdr[:]); err != nil {
			return 0, nil, lost(err, c.timeout)
		}
		t, n, err := parseControlHeader(hdr[:])
		if err != nil {
			return 0, nil, err
		}
		if cap(c.body) < n {
			c.body = make([]byte, n)
		}
		if _, err := io.ReadFull(c.r, c.body[:n]); err != nil {
			return 0, nil, lost(err, c.timeout)
		}
		if t != ctlPing {
			return t, c.body[:n], nil
		}
		if n != 0 {
			return 0, nil, violation("ping with a body")
		}
	}
}

// lost words a read error so that a person knows what it means.
func lost(err error, timeout time.Duration) error {
	if ne, ok := err.(net.Error); ok && ne.Timeout() {
		return fmt.Errorf("the other host has been silent for %v: %w", timeout, err)
	}
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("the other host closed the connection: %w", err)
	}
	return err
}

func quote(s string) string { return fmt.Sprintf("%q", s) }
