package libvirt

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"time"

	lv "github.com/digitalocean/go-libvirt"
)

// errDisconnected is in the chain of errors of calls that libvirtd may or may
// not have carried out: the connection broke, or there was none.
var errDisconnected = errors.New("no connection to libvirtd")

// The pauses between two attempts to reach libvirtd.
const (
	reconnectFirst = 50 * time.Millisecond
	reconnectLast  = 2 * time.Second
)

// connection is the connection to the host's libvirtd, made again whenever it
// breaks.
type connection struct {
	uri *url.URL

	mu      sync.Mutex
	current *link // nil while there is none
	cause   error // why
	changed chan struct{}
}

func newConnection(text string) (*connection, error) {
	uri, err := url.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("libvirt: URI: %w", err)
	}
	return &connection{uri: uri, cause: errors.New("not yet tried"), changed: make(chan struct{})}, nil
}

func (c *connection) set(l *link, cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.current, c.cause = l, cause
	close(c.changed)
	c.changed = make(chan struct{})
}

// get is the connection there is.
func (c *connection) get() (*link, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current == nil {
		return nil, fmt.Errorf("%w at %s: %w", errDisconnected, c.uri, c.cause)
	}
	return c.current, nil
}

// alive says whether there is one.
func (c *connection) alive() bool {
	_, err := c.get()
	return err == nil
}

// await is the connection as soon as there is one.
func (c *connection) await(ctx context.Context) (*link, error) {
	for {
		c.mu.Lock()
		l, changed := c.current, c.changed
		c.mu.Unlock()
		if l != nil {
			return l, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			_, err := c.get()
			return nil, errors.Join(err, context.Cause(ctx))
		}
	}
}

// keep connects, calls up, and does so again whenever the connection is lost,
// after which it calls down; until ctx ends. Up fails if the connection is of no
// use.
func (c *connection) keep(ctx context.Context, up func(*link) error, down func(error)) {
	pause := reconnectFirst
	for ctx.Err() == nil {
		made, err := lv.ConnectToURI(c.uri)
		if err == nil {
			l := &link{Libvirt: made, subs: make(map[string]bool)}
			if err = up(l); err == nil {
				c.set(l, nil)
				pause = reconnectFirst
				select {
				case <-l.Disconnected():
				case <-ctx.Done():
				}
				err = errors.New("the connection was lost")
			}
			l.end()
		}
		c.set(nil, err)
		down(err)
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
			pause = min(2*pause, reconnectLast)
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

// endTimeout is how long libvirtd may take to say goodbye.
const endTimeout = 2 * time.Second

// end closes a connection, which may be broken, or libvirtd hang.
func (k *link) end() {
	over := make(chan struct{})
	go func() {
		defer close(over)
		_ = k.Disconnect() // nothing more can be done with it
	}()
	timer := time.NewTimer(endTimeout)
	defer timer.Stop()
	select {
	case <-over:
	case <-timer.C:
	}
}

// call makes a request of libvirtd. When ctx ends it returns without the answer:
// the request may still be carried out.
func call[T any](ctx context.Context, l *link, request func(*link) (T, error)) (T, error) {
	type answer struct {
		value T
		err   error
	}
	answers := make(chan answer, 1)
	go func() {
		value, err := request(l)
		answers <- answer{value, err}
	}()
	var none T
	select {
	case a := <-answers:
		if a.err != nil {
			select {
			case <-l.Disconnected():
				return none, fmt.Errorf("%w: %w", errDisconnected, a.err)
			default:
			}
			return none, a.err
		}
		return a.value, nil
	case <-ctx.Done():
		return none, context.Cause(ctx)
	}
}

// do is call for a request without an answer of its own.
func do(ctx context.Context, l *link, request func(*link) error) error {
	_, err := call(ctx, l, func(l *link) (struct{}, error) { return struct{}{}, request(l) })
	return err
}

// isCode says whether libvirt's answer was an error of this kind.
func isCode(err error, code lv.ErrorNumber) bool {
	var e lv.Error
	return errors.As(err, &e) && e.Code == uint32(code)
}
