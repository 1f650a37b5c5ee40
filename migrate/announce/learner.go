package announce

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"
)

// Learner learns a guest's addresses from what goes through its tap: ARP, DHCP
// and IPv6 neighbour discovery, and nothing else, which a filter in the kernel
// sees to. It keeps the 16 addresses of each family that it saw last; one that
// the guest gave back to the DHCP server, or that another machine is heard to
// use, is forgotten, so that a migration never announces it. An address that
// the guest is still checking for duplicates does not count yet.
//
// It goes on when the tap goes down and comes up. When the tap is removed it
// keeps what it knows.
type Learner struct {
	conn *packet.Conn
	mac  net.HardwareAddr
	stop func() bool // ends the watch on the context
	done chan struct{}
	once sync.Once // closes conn

	mu     sync.Mutex
	book   book
	closed bool
	err    error // why the reading ended by itself
}

// Start begins to learn the addresses of the guest with this MAC on the
// interface ifname, its tap. The learner ends with ctx or with Close, and
// Close must be called in either case.
func Start(ctx context.Context, ifname string, mac net.HardwareAddr) (*Learner, error) {
	if len(mac) != 6 || mac[0]&1 != 0 {
		return nil, fmt.Errorf("announce: learn on %s: %q is not the MAC of one card", ifname, mac)
	}
	ifi, err := net.InterfaceByName(ifname)
	if err != nil {
		return nil, fmt.Errorf("announce: learn on %s: %w", ifname, err)
	}
	mac = slices.Clone(mac)
	filter, err := learnFilter(mac)
	if err != nil {
		return nil, fmt.Errorf("announce: learn on %s: %w", ifname, err)
	}
	// A bridge takes a frame before sockets for a single protocol see it, so
	// the socket is one for all protocols.
	conn, err := packet.Listen(ifi, packet.Raw, unix.ETH_P_ALL, &packet.Config{Filter: filter})
	if err != nil {
		return nil, fmt.Errorf("announce: learn on %s: %w", ifname, err)
	}
	if err := stampFrames(conn); err != nil {
		return nil, errors.Join(fmt.Errorf("announce: learn on %s: %w", ifname, err), conn.Close())
	}
	l := &Learner{conn: conn, mac: mac, done: make(chan struct{})}
	// A deadline wakes the reader; the socket is closed by Close alone.
	l.stop = context.AfterFunc(ctx, l.interrupt)
	go l.run()
	return l, nil
}

// stampFrames has the kernel take the time of every frame for as long as the
// socket is open. The learner has no use for it, but a migration's Stranded
// does, and the kernel begins some while after it was first asked: a guest with
// a learner has no frame without a time.
func stampFrames(conn *packet.Conn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TIMESTAMPING_NEW, stamps)
	})
	return errors.Join(err, named("SO_TIMESTAMPING", set))
}

func (l *Learner) interrupt() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	if err := l.conn.SetReadDeadline(time.Unix(1, 0)); err != nil && l.err == nil {
		l.err = err
	}
}

func (l *Learner) run() {
	defer close(l.done)
	b := make([]byte, snapLength)
	for {
		n, _, err := l.conn.ReadFrom(b)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return
		case errors.Is(err, unix.ENETDOWN):
			continue // told once each time the tap goes down; it may come up again
		case err != nil:
			l.mu.Lock()
			l.err = err
			l.mu.Unlock()
			return
		}
		s := sight(b[:n], l.mac)
		l.mu.Lock()
		l.book.add(s, time.Now())
		l.mu.Unlock()
	}
}

// Addresses lists what has been learnt, IPv4 first, in ascending order.
func (l *Learner) Addresses() []netip.Addr {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.book.addresses(time.Now())
}

// Router says whether the guest has shown itself to be an IPv6 router.
func (l *Learner) Router() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.book.routes
}

// Close ends the learning and waits for its goroutine. Addresses still answers
// afterwards. The error says why the learner had stopped by itself, if it had.
func (l *Learner) Close() error {
	l.once.Do(func() {
		l.stop()
		l.interrupt()
		<-l.done
		l.mu.Lock()
		defer l.mu.Unlock()
		l.closed = true
		if err := l.conn.Close(); err != nil && l.err == nil {
			l.err = err
		}
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return fmt.Errorf("announce: learn %s: %w", l.mac, l.err)
	}
	return nil
}
