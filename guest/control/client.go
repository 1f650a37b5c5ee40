package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// Client talks to a guest over one connection, a request at a time.
type Client struct {
	conn net.Conn
	in   *bufio.Scanner
}

// NewClient speaks over conn, which Close closes.
func NewClient(conn net.Conn) *Client {
	in := bufio.NewScanner(conn)
	in.Buffer(make([]byte, 4096), MaxLine)
	return &Client{conn: conn, in: in}
}

// Do sends a request and waits for the guest's status. A request that the guest
// could not do is an error. After any other error the connection is spent.
func (c *Client) Do(ctx context.Context, req Request) (Status, error) {
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	st, err := c.do(req)
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		return st, fmt.Errorf("guest %s: %s: %w", c.conn.RemoteAddr(), req.Do, err)
	}
	return st, nil
}

func (c *Client) do(req Request) (Status, error) {
	line, err := json.Marshal(req)
	if err != nil {
		return Status{}, err
	}
	if _, err := c.conn.Write(append(line, '\n')); err != nil {
		return Status{}, err
	}
	if !c.in.Scan() {
		if err := c.in.Err(); err != nil {
			return Status{}, err
		}
		return Status{}, io.ErrUnexpectedEOF
	}
	return ParseReply(c.in.Bytes())
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// ParseReply reads a line that a guest answered with.
func ParseReply(line []byte) (Status, error) {
	var r Reply
	if err := json.Unmarshal(line, &r); err != nil {
		return Status{}, fmt.Errorf("answer not understood: %w", err)
	}
	if r.Error != "" {
		return Status{}, errors.New(r.Error)
	}
	if r.Status == nil {
		return Status{}, errors.New("answer without a status")
	}
	return *r.Status, nil
}
