package libvirt

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// streamFolder makes the folder of a domain's sockets, which QEMU's user alone
// can use.
func (f files) streamFolder(uid, gid int) (string, error) {
	if err := passable(f.dir); err != nil {
		return "", err
	}
	dir := f.stream()
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	return dir, os.Chown(dir, uid, gid)
}

// qemuStream is what QEMU says to a migration's destination.
type qemuStream struct {
	listener *net.UnixListener
	done     chan struct{} // closed when nothing is written any more
	err      error         // valid then; nil if QEMU's stream came to its end

	stop context.CancelFunc
}

// acceptTimeout is how long libvirt may take to have QEMU connect.
const acceptTimeout = 30 * time.Second

// listenFor waits for a process to connect to a socket at path and has carry
// take what it says, to its end.
func listenFor(path string, p *process, carry func(*net.UnixConn) error) (*qemuStream, error) {
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	if err := errors.Join(os.Chown(path, p.uid, p.gid), os.Chmod(path, 0o600), ln.SetDeadline(time.Now().Add(acceptTimeout))); err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	ctx, stop := context.WithCancel(context.Background())
	s := &qemuStream{listener: ln, done: make(chan struct{}), stop: stop}
	go func() {
		defer close(s.done)
		s.err = s.carry(ctx, p, carry)
	}()
	return s, nil
}

func (s *qemuStream) carry(ctx context.Context, p *process, carry func(*net.UnixConn) error) (err error) {
	conn, err := s.listener.AcceptUnix()
	if closeErr := s.listener.Close(); err == nil && !errors.Is(closeErr, net.ErrClosed) {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("wait for QEMU's stream: %w", err)
	}
	cancel := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer cancel()
	defer func() {
		// A QEMU that still writes learns here that nobody reads.
		if closeErr := conn.Close(); err == nil && closeErr != nil && !errors.Is(closeErr, net.ErrClosed) {
			err = closeErr
		}
	}()
	if err := from(conn, p); err != nil {
		return err
	}
	return carry(conn)
}

// from refuses a connection that is neither a process's nor root's: libvirtd
// may connect and hand the connection on. Other domains' processes may be of the
// same user.
func from(conn *net.UnixConn, p *process) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) { peer, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if failed != nil {
		return fmt.Errorf("SO_PEERCRED: %w", failed)
	}
	if int(peer.Pid) != p.pid && peer.Uid != 0 {
		return fmt.Errorf("process %d has connected in place of the domain's QEMU, %d", peer.Pid, p.pid)
	}
	return nil
}

// close breaks the stream off. Bytes may be written until done is closed.
func (s *qemuStream) close() error {
	s.stop()
	if err := s.listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// dial connects to a QEMU that waits at a socket, which must be the process's.
func dial(ctx context.Context, path string, p *process) (*net.UnixConn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	unixConn := conn.(*net.UnixConn)
	if err := from(unixConn, p); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return unixConn, nil
}

// The sockets' names.
func outgoingSocket(dir string) string { return filepath.Join(dir, "out") }
func incomingSocket(dir string) string { return filepath.Join(dir, "in") }
