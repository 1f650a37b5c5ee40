// Package client puts load on a lab's Linux guest from outside and keeps
// account of what came back: Number over one TCP connection, Ping over UDP.
package client

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// Gap is the longest time between two replies.
type Gap struct {
	Start  time.Time     `json:"start"`
	Length time.Duration `json:"length_ns"`
}

// meter finds the longest gap.
type meter struct {
	last time.Time
	gap  Gap
}

func (m *meter) reply(now time.Time) {
	if d := now.Sub(m.last); !m.last.IsZero() && d > m.gap.Length {
		m.gap = Gap{Start: m.last, Length: d}
	}
	m.last = now
}

// Numbered is the account of Number.
type Numbered struct {
	Sent    uint64 `json:"sent"`    // requests
	Replied uint64 `json:"replied"` // of them, answered
	Lost    uint64 `json:"lost"`    // never answered
	// Doubled are replies that came again, or to nothing that was asked.
	Doubled uint64 `json:"doubled"`
	// Unordered are replies that came in another order than the requests.
	Unordered uint64   `json:"unordered"`
	BootIDs   []string `json:"boot_ids"` // of the guests that answered: one, if all is well
	Gap       Gap      `json:"gap"`      // longest time between two replies
}

// Whole says whether every request was answered once, in order, by one guest.
func (n Numbered) Whole() bool {
	return n.Replied > 0 && n.Lost == 0 && n.Doubled == 0 && n.Unordered == 0 && len(n.BootIDs) == 1
}

// settle is how long replies may take when requests have ended.
const settle = 20 * time.Second

// Number sends a numbered request to control.NumberedPort every interval until
// ctx ends, whether or not the ones before were answered, then waits for the
// replies that are still out. It closes conn. The error is the connection's
// end, if that came first; the account holds until then.
func Number(ctx context.Context, conn net.Conn, interval time.Duration) (Numbered, error) {
	defer conn.Close()
	sent := make(chan uint64, 1)
	failed := make(chan error, 1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		n, err := sendNumbers(ctx, conn, interval)
		// The rest must come within reason. With nothing out it never does:
		// closing this half makes the guest hang up when it has answered all.
		if half, ok := conn.(interface{ CloseWrite() error }); ok && err == nil {
			err = half.CloseWrite()
		}
		_ = conn.SetReadDeadline(time.Now().Add(settle)) // of a connection that may be gone
		failed <- err
		sent <- n
	}()
	n, err := readNumbers(conn)
	cancel()
	err = errors.Join(err, <-failed)
	n.Sent = <-sent
	if n.Replied < n.Sent {
		n.Lost = n.Sent - n.Replied
	}
	return n, err
}

func sendNumbers(ctx context.Context, conn net.Conn, interval time.Duration) (uint64, error) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for n := uint64(0); ; n++ {
		select {
		case <-ctx.Done():
			return n, nil
		case <-tick.C:
		}
		if _, err := fmt.Fprintf(conn, "%d\n", n+1); err != nil {
			return n, fmt.Errorf("request %d: %w", n+1, err)
		}
	}
}

// readNumbers reads replies until the connection ends.
func readNumbers(conn net.Conn) (Numbered, error) {
	var n Numbered
	var m meter
	var lastOwn uint64
	in := bufio.NewScanner(conn)
	for in.Scan() {
		var seq, own, ns uint64
		var boot string
		if _, err := fmt.Sscanf(in.Text(), "%d %d %d %s", &seq, &own, &ns, &boot); err != nil {
			return n, fmt.Errorf("reply %q: %w", in.Text(), err)
		}
		m.reply(time.Now())
		n.Gap = m.gap
		if len(n.BootIDs) == 0 || n.BootIDs[len(n.BootIDs)-1] != boot {
			n.BootIDs = append(n.BootIDs, boot)
		}
		switch {
		case seq <= n.Replied:
			n.Doubled++
			continue
		case seq != n.Replied+1 || own <= lastOwn:
			n.Unordered++
		}
		n.Replied, lastOwn = n.Replied+1, own
	}
	if err := in.Err(); err != nil {
		return n, fmt.Errorf("replies: %w", err)
	}
	return n, nil
}

// Pinged is the account of Ping.
type Pinged struct {
	Sent    uint64 `json:"sent"`    // datagrams
	Lost    uint64 `json:"lost"`    // of them, without an answer
	Doubled uint64 `json:"doubled"` // answers that came again
	Gap     Gap    `json:"gap"`     // longest time between two answers
	// RoundTrip is the longest time from a datagram to its answer.
	RoundTrip time.Duration `json:"round_trip_ns"`
}

// linger is how long answers may take when the last datagram is out.
const linger = 500 * time.Millisecond

// Ping sends a datagram to control.EchoPort every interval until ctx ends, and
// closes conn. A datagram that cannot be sent, as while a link is down, counts
// as lost.
func Ping(ctx context.Context, conn net.Conn, interval time.Duration) (Pinged, error) {
	defer conn.Close()
	sent := make(chan uint64, 1)
	go func() {
		n := sendPings(ctx, conn, interval)
		_ = conn.SetReadDeadline(time.Now().Add(linger))
		sent <- n
	}()
	var p Pinged
	var m meter
	seen := make(map[uint64]bool)
	buf := make([]byte, 64)
	for {
		size, err := conn.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		// The kernel passes on that a port is closed or a host not there: it may
		// come back.
		if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.ENETUNREACH) {
			continue
		}
		if err != nil {
			return p, fmt.Errorf("ping: %w", err)
		}
		if size != pingSize {
			continue
		}
		now := time.Now()
		seq := binary.BigEndian.Uint64(buf)
		if seen[seq] {
			p.Doubled++
			continue
		}
		seen[seq] = true
		m.reply(now)
		p.RoundTrip = max(p.RoundTrip, time.Duration(now.UnixNano()-int64(binary.BigEndian.Uint64(buf[8:]))))
	}
	p.Sent, p.Gap = <-sent, m.gap
	p.Lost = p.Sent - uint64(len(seen))
	return p, nil
}

// pingSize is the length of a datagram: its number and the time, in
// nanoseconds.
const pingSize = 16

func sendPings(ctx context.Context, conn net.Conn, interval time.Duration) uint64 {
	// Go's timers are good to a millisecond only. The thread keeps its slack,
	// so it is not given back.
	runtime.LockOSThread()
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0) // coarser without
	buf := make([]byte, pingSize)
	next := time.Now()
	for n := uint64(0); ; n++ {
		if ctx.Err() != nil {
			return n
		}
		binary.BigEndian.PutUint64(buf, n)
		binary.BigEndian.PutUint64(buf[8:], uint64(time.Now().UnixNano()))
		_, _ = conn.Write(buf) // lost is counted by what does not come back
		next = next.Add(interval)
		if wait := time.Until(next); wait > 0 {
			ts := unix.NsecToTimespec(int64(wait))
			_ = unix.Nanosleep(&ts, nil) // an early wake-up sends early
		} else {
			next = time.Now() // held up: no burst
		}
	}
}
