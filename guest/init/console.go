package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/control"
)

// converse answers each line of rw that is a request.
func (g *guest) converse(ctx context.Context, rw io.ReadWriter) {
	in := bufio.NewScanner(rw)
	in.Buffer(make([]byte, 4096), control.MaxLine)
	for in.Scan() {
		line, after := g.answer(ctx, in.Bytes())
		if _, err := rw.Write(line); err != nil {
			return
		}
		after()
	}
}

func (g *guest) answer(ctx context.Context, line []byte) (reply []byte, after func()) {
	var req control.Request
	var r control.Reply
	if err := json.Unmarshal(line, &req); err != nil {
		r, after = control.Reply{Error: "request not understood: " + err.Error()}, func() {}
	} else {
		r, after = g.do(ctx, req)
	}
	reply, err := json.Marshal(r)
	if err != nil {
		reply = fmt.Appendf(nil, `{"error":%q}`, err)
	}
	return append(reply, '\n'), after
}

// console is the serial console: status goes out, requests may come in.
type console struct {
	mu   sync.Mutex // keeps lines whole
	file *os.File
}

// openConsole opens the serial port as a plain line of bytes, without echo. The
// kernel's own messages come out there too.
func openConsole() (*console, error) {
	// Non-blocking, so that a read can be ended.
	f, err := os.OpenFile("/dev/ttyS0", os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("console: %w", err)
	}
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err == nil {
		t.Lflag &^= unix.ECHO | unix.ICANON | unix.ISIG
		err = unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t)
	}
	if err == nil {
		err = unix.SetNonblock(int(f.Fd()), true) // Fd has undone it
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("console: %w", err)
	}
	return &console{file: f}, nil
}

func (c *console) Close() error { return c.file.Close() }

// serve says that the guest is ready, then its status from time to time, and
// answers requests, until ctx ends.
func (c *console) serve(ctx context.Context, g *guest) error {
	var wg sync.WaitGroup
	defer func() {
		// Here, and not when ctx ends: that may be told to this function first,
		// and taking the wish back would leave the reader waiting for ever.
		_ = c.file.SetReadDeadline(time.Unix(1, 0))
		wg.Wait()
	}()
	wg.Go(func() { g.converse(ctx, &marked{c}) })
	if err := c.report(control.ReadyMark, g); err != nil {
		return err
	}
	tick := time.NewTicker(g.settings.Report)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if err := c.report(control.StatusMark, g); err != nil {
				return err
			}
		}
	}
}

func (c *console) report(mark string, g *guest) error {
	line, err := json.Marshal(g.status())
	if err != nil {
		return fmt.Errorf("console: %w", err)
	}
	return c.line(mark, append(line, '\n'))
}

func (c *console) line(mark string, line []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, err := c.file.Write(append([]byte("\n"+mark), line...)); err != nil {
		return fmt.Errorf("console: %w", err)
	}
	return nil
}

// marked is the console with replies marked as such.
type marked struct{ *console }

func (m *marked) Read(p []byte) (int, error) { return m.file.Read(p) }

func (m *marked) Write(p []byte) (int, error) { return len(p), m.line(control.ReplyMark, p) }
