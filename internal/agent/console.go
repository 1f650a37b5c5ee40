package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
)

// Console implements lmctlv1.GuestsServer.
func (s *guestService) Console(stream grpc.BidiStreamingServer[lmctlv1.ConsoleInput, lmctlv1.ConsoleOutput]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	info, err := s.a.driver.Get(first.GetName())
	if err != nil {
		return err
	}
	refuse := func(cause string) error {
		return &api.Error{Code: codes.FailedPrecondition, Operation: "open console of guest", Object: info.Name, Cause: cause}
	}
	if info.PID == 0 {
		return refuse("it is not running")
	}
	conn, err := new(net.Dialer).DialContext(stream.Context(), "unix", info.ConsolePath)
	if err != nil {
		return refuse(err.Error())
	}
	ctx, cancel := s.a.untilStop(stream.Context())
	defer cancel()
	return carry(ctx, stream, conn, first.GetData())
}

// carry moves bytes between a console and a stream until either or the call ends.
func carry(call context.Context, stream grpc.BidiStreamingServer[lmctlv1.ConsoleInput, lmctlv1.ConsoleOutput], conn net.Conn, first []byte) error {
	group, ctx := errgroup.WithContext(call)
	over := context.AfterFunc(ctx, func() { closeQuietly(conn) })
	defer over()
	// A reader of the stream cannot be woken but by the end of the call: it is
	// not waited for.
	inputs := make(chan error, 1)
	go func() {
		data := first
		for {
			if _, err := conn.Write(data); err != nil {
				inputs <- err
				return
			}
			in, err := stream.Recv()
			if err != nil {
				inputs <- err
				return
			}
			data = in.GetData()
		}
	}()
	group.Go(func() error {
		buf := make([]byte, 4096)
		for {
			n, err := conn.Read(buf)
			if n > 0 {
				if err := stream.Send(&lmctlv1.ConsoleOutput{Data: buf[:n]}); err != nil {
					return err
				}
			}
			if err != nil {
				return io.EOF // the guest has ended, or the call
			}
		}
	})
	group.Go(func() error {
		select {
		case err := <-inputs:
			if err == nil || errors.Is(err, io.EOF) {
				return io.EOF
			}
			return fmt.Errorf("agent: console: %w", err)
		case <-ctx.Done():
			return nil
		}
	})
	if err := group.Wait(); err != nil && !errors.Is(err, io.EOF) && call.Err() == nil {
		return err
	}
	return nil
}

// closeQuietly closes a connection whose end is what is wanted.
func closeQuietly(c io.Closer) {
	_ = c.Close() //nolint:errcheck // nothing was written that matters
}
