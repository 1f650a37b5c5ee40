package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
)

// leaveKey ends a console: Ctrl-].
const leaveKey = 0x1d

func newGuestConsoleCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "console NAME", Short: "Attach to a guest's serial console (Ctrl-] leaves)", Args: takes("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.withAgent(func(c *api.Client) error { return o.console(cmd.Context(), c, args[0]) })
		},
	}
}

func (o *options) console(ctx context.Context, c *api.Client, name string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.Guests.Console(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&lmctlv1.ConsoleInput{Name: name}); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if f, ok := o.in.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		before, err := term.MakeRaw(int(f.Fd()))
		if err != nil {
			return fmt.Errorf("make the terminal raw: %w", err)
		}
		defer func() { _ = term.Restore(int(f.Fd()), before) }()
		fmt.Fprintf(o.err, "console of %s, Ctrl-] leaves\r\n", name)
	}
	left := make(chan struct{})
	go func() {
		defer close(left)
		o.typeInto(stream)
	}()
	out := make(chan error, 1)
	go func() { out <- o.showFrom(stream) }()
	select {
	case err := <-out:
		return err
	case <-left:
		cancel()
		<-out
		return nil
	}
}

// typeInto sends what is typed until the key to leave, or the end of input.
func (o *options) typeInto(stream lmctlv1.Guests_ConsoleClient) {
	buf := make([]byte, 4096)
	for {
		n, err := o.in.Read(buf)
		for i := range n {
			if buf[i] == leaveKey {
				return
			}
		}
		if n > 0 && stream.Send(&lmctlv1.ConsoleInput{Data: buf[:n]}) != nil {
			return
		}
		if err != nil {
			return
		}
	}
}

// showFrom prints what the guest says until the stream ends.
func (o *options) showFrom(stream lmctlv1.Guests_ConsoleClient) error {
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := o.out.Write(m.Data); err != nil {
			return err
		}
	}
}
