package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/lmctl/lmctl/guest/control"
)

// console talks to a Linux guest over its serial port, which needs no network.
type console struct {
	conn net.Conn
	in   *bufio.Reader
}

func dialConsole(ctx context.Context, path string) (*console, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("console: %w", err)
	}
	return &console{conn: conn, in: bufio.NewReader(conn)}, nil
}

// close gives the console to the next one; nothing can be lost with it.
func (c *console) close() { _ = c.conn.Close() }

// ready waits until the guest says that it is up.
func (c *console) ready(ctx context.Context) (control.Status, error) {
	line, err := c.await(ctx, control.ReadyMark)
	if err != nil {
		return control.Status{}, err
	}
	var st control.Status
	if err := json.Unmarshal([]byte(line), &st); err != nil {
		return control.Status{}, fmt.Errorf("console: status not understood: %w", err)
	}
	return st, nil
}

// do asks the guest for something.
func (c *console) do(ctx context.Context, req control.Request) (control.Status, error) {
	b, err := json.Marshal(req)
	if err != nil {
		return control.Status{}, fmt.Errorf("console: %w", err)
	}
	if _, err := c.conn.Write(append(b, '\n')); err != nil {
		return control.Status{}, fmt.Errorf("console: %w", err)
	}
	line, err := c.await(ctx, control.ReplyMark)
	if err != nil {
		return control.Status{}, fmt.Errorf("ask the guest for %q: %w", req.Do, err)
	}
	return control.ParseReply([]byte(line))
}

// await returns what follows a mark.
func (c *console) await(ctx context.Context, mark string) (string, error) {
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		line, err := c.in.ReadString('\n')
		if err != nil {
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			return "", fmt.Errorf("console: wait for %s: %w", strings.TrimSpace(mark), err)
		}
		if rest, ok := strings.CutPrefix(line, mark); ok {
			return strings.TrimSpace(rest), nil
		}
	}
}
