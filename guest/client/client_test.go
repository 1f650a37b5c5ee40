package client

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/lmctl/lmctl/guest/workload"
)

// server answers each request number with the lines that script returns.
func server(t *testing.T, script func(seq int) string) net.Conn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer l.Close()
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		for in := bufio.NewScanner(c); in.Scan(); {
			seq, err := strconv.Atoi(in.Text())
			if err != nil {
				return
			}
			if _, err := c.Write([]byte(script(seq))); err != nil {
				return
			}
		}
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); <-done })
	return c
}

// run lets Number ask until the server has seen requests of them.
func run(t *testing.T, requests int, script func(seq int) string) (Numbered, error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	return Number(ctx, server(t, func(seq int) string {
		if seq == requests {
			cancel()
		}
		return script(seq)
	}), time.Millisecond)
}

func TestNumberWhole(t *testing.T) {
	n, err := run(t, 50, func(seq int) string { return fmt.Sprintf("%d %d 0 boot\n", seq, seq+7) })
	if err != nil || !n.Whole() || n.Sent < 50 || n.Replied != n.Sent || n.Gap.Length == 0 {
		t.Errorf("%+v, %v", n, err)
	}
}

func TestNumberFaults(t *testing.T) {
	reply := func(seq, own int, boot string) string { return fmt.Sprintf("%d %d 0 %s\n", seq, own, boot) }
	for name, tt := range map[string]struct {
		script func(seq int) string
		bad    func(Numbered) bool
	}{
		"lost": {func(seq int) string {
			if seq == 20 {
				return ""
			}
			return reply(seq, seq, "b")
		}, func(n Numbered) bool { return n.Lost == 1 && n.Unordered > 0 }},
		"doubled": {func(seq int) string {
			if seq == 20 {
				return reply(seq, seq, "b") + reply(seq, seq, "b")
			}
			return reply(seq, seq, "b")
		}, func(n Numbered) bool { return n.Doubled == 1 && n.Lost == 0 }},
		"gone back": {func(seq int) string {
			if seq > 20 {
				return reply(seq, seq-10, "b")
			}
			return reply(seq, seq, "b")
		}, func(n Numbered) bool { return n.Unordered == 1 }},
		"another boot": {func(seq int) string {
			if seq > 20 {
				return reply(seq, seq, "c")
			}
			return reply(seq, seq, "b")
		}, func(n Numbered) bool { return len(n.BootIDs) == 2 }},
	} {
		t.Run(name, func(t *testing.T) {
			n, err := run(t, 40, tt.script)
			if err != nil || n.Whole() || !tt.bad(n) {
				t.Errorf("%+v, %v", n, err)
			}
		})
	}
	if _, err := run(t, 5, func(int) string { return "hello\n" }); err == nil || !strings.Contains(err.Error(), "hello") {
		t.Errorf("nonsense for a reply: %v", err)
	}
}

func TestPing(t *testing.T) {
	pc, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	at := pc.LocalAddr().String()
	served := workload.NewNet("boot", time.Now())
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- served.Echo(ctx, pc) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	conn, err := net.Dial("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	pinging, stop := context.WithCancel(t.Context())
	go func() {
		defer stop()
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for deadline := time.Now().Add(time.Minute); served.Status().Echoed < 100 && time.Now().Before(deadline); <-tick.C {
		}
	}()
	p, err := Ping(pinging, conn, 500*time.Microsecond)
	if err != nil || p.Sent < 100 || p.Lost != 0 || p.Doubled != 0 || p.Gap.Length == 0 || p.RoundTrip == 0 {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestPingLoss(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("udp", pc.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	pinging, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { // answers every third twice, and the others not at all
		defer close(done)
		defer stop()
		buf := make([]byte, 64)
		for i := range 30 {
			size, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			for range 2 {
				if i%3 == 0 {
					_, _ = pc.WriteTo(buf[:size], from)
				}
			}
		}
	}()
	p, err := Ping(pinging, conn, time.Millisecond)
	if closeErr := pc.Close(); closeErr != nil {
		t.Error(closeErr)
	}
	<-done
	if err != nil || p.Lost < 20 || p.Lost != p.Sent-10 || p.Doubled != 10 {
		t.Errorf("%+v, %v", p, err)
	}
}
