package qemu

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor/qemu/devstate"
)

// socketPair makes a stream socket for QEMU and our end of it.
func socketPair(name string) (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), name)
	local := os.NewFile(uintptr(fds[0]), name)
	conn, err := net.FileConn(local)
	if err = errors.Join(err, local.Close()); err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn.(*net.UnixConn), theirs, nil
}

// stateStream carries device state out of QEMU, rewritten on the way.
type stateStream struct {
	conn *net.UnixConn
	done chan struct{} // closed when nothing is written any more
	err  error         // valid then; nil if QEMU's stream came to its end
}

// forward begins to write what QEMU says on conn to w.
func forward(conn *net.UnixConn, w io.Writer) *stateStream {
	s := &stateStream{conn: conn, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		s.err = devstate.Rewrite(w, conn)
		// A QEMU that still writes learns here that nobody reads.
		if err := conn.Close(); s.err == nil && err != nil && !errors.Is(err, net.ErrClosed) {
			s.err = err
		}
	}()
	return s
}

// close breaks the stream off. Bytes may be written until done is closed.
func (s *stateStream) close() error {
	if err := s.conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// reason is why the stream ended before its time. It is asked for once done is
// closed.
func (s *stateStream) reason() error {
	if s.err == nil {
		return errors.New("QEMU closed it")
	}
	return s.err
}
