package workload

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/control"
)

// Net is the guest's services for clients: one that numbers its replies over
// TCP, and an echo over UDP.
type Net struct {
	bootID string
	start  time.Time

	mu      sync.Mutex // keeps numbers in the order in which replies are made
	replies uint64

	accepted, outOfOrder, echoed atomic.Uint64
}

// NewNet returns services whose replies carry bootID and the time since start.
func NewNet(bootID string, start time.Time) *Net { return &Net{bootID: bootID, start: start} }

// Status is the account so far.
func (n *Net) Status() control.NetStatus {
	n.mu.Lock()
	defer n.mu.Unlock()
	return control.NetStatus{
		Accepted: n.accepted.Load(), Replies: n.replies,
		OutOfOrder: n.outOfOrder.Load(), Echoed: n.echoed.Load(),
	}
}

// Number serves control.NumberedPort's protocol on l until ctx ends, and closes
// l.
func (n *Net) Number(ctx context.Context, l net.Listener) error {
	return Serve(ctx, l, func(c net.Conn) {
		n.accepted.Add(1)
		n.number(c)
	})
}

func (n *Net) number(c net.Conn) {
	in := bufio.NewScanner(c)
	in.Buffer(make([]byte, 256), 256)
	last := uint64(0)
	for in.Scan() {
		seq, err := strconv.ParseUint(in.Text(), 10, 64)
		if err != nil {
			return // not a client of ours
		}
		if seq != last+1 {
			n.outOfOrder.Add(1)
		}
		last = seq
		n.mu.Lock()
		n.replies++
		own := n.replies
		n.mu.Unlock()
		if _, err := fmt.Fprintf(c, "%d %d %d %s\n", seq, own, time.Since(n.start).Nanoseconds(), n.bootID); err != nil {
			return
		}
	}
}

// echoWake is how long Echo may take to see that ctx has ended.
const echoWake = 500 * time.Millisecond

// Echo sends each datagram back until ctx ends, and closes conn. It keeps a
// thread of its own in the kernel: on an emulated CPU a thousand datagrams a
// second are hard work, and Go's poller would double it.
func (n *Net) Echo(ctx context.Context, conn *net.UDPConn) error {
	f, err := conn.File() // a copy, and blocking
	if err = errors.Join(err, conn.Close()); err != nil {
		return fmt.Errorf("echo: %w", err)
	}
	defer f.Close()
	fd := int(f.Fd())
	// Room for what arrives while the guest stands still. Only root may have
	// more than the system's limit.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20); err != nil && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("echo: %w", err)
	}
	wake := unix.NsecToTimeval(echoWake.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wake); err != nil {
		return fmt.Errorf("echo: %w", err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	buf := make([]byte, 64<<10)
	for ctx.Err() == nil {
		size, from, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("echo: %w", err)
		}
		// Counted only if it went out; a full queue loses a datagram, as
		// anywhere.
		if err := unix.Sendto(fd, buf[:size], 0, from); err == nil {
			n.echoed.Add(1)
		}
	}
	return nil
}

// Serve gives each connection to l a goroutine until ctx ends; then it closes l
// and all connections, and returns when all are done.
func Serve(ctx context.Context, l net.Listener, handle func(net.Conn)) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept on %s: %w", l.Addr(), err)
		}
		wg.Go(func() {
			hangUp := context.AfterFunc(ctx, func() { _ = c.Close() })
			defer hangUp()
			defer c.Close()
			handle(c)
		})
	}
}
