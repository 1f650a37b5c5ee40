package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/lmctl/lmctl/internal/pki"
)

// mux accepts connections on the agent's port, does the handshake and hands
// each to the one that serves its protocol. A peer costs a goroutine and a
// place in a short queue until it has shown a certificate, for a few seconds.
type mux struct {
	listener net.Listener
	config   *tls.Config
	timeout  time.Duration
	log      *slog.Logger
	// migrate serves a connection of the data plane and closes it.
	migrate func(ctx context.Context, conn net.Conn, host string)

	handshakes  chan struct{} // one token for each under way
	connections chan struct{} // one for each connection
	api         chan net.Conn
	done        chan struct{}
	once        sync.Once
	wg          sync.WaitGroup
}

func newMux(ln net.Listener, id *pki.Identity, limits LimitsConfig, log *slog.Logger) *mux {
	return &mux{
		listener: ln, log: log, timeout: limits.HandshakeTimeout,
		config:      id.ServerConfig(pki.ALPNAPI, pki.ALPNMigrate),
		handshakes:  make(chan struct{}, limits.Handshakes),
		connections: make(chan struct{}, limits.Connections),
		api:         make(chan net.Conn),
		done:        make(chan struct{}),
	}
}

// run accepts until close, and returns when the data plane's connections have
// ended too: by themselves, or because ctx has.
func (m *mux) run(ctx context.Context) error {
	defer m.wg.Wait()
	pause := acceptFirst
	for {
		// Too many strangers at once wait in the kernel's queue.
		select {
		case m.handshakes <- struct{}{}:
		case <-m.done:
			return nil
		}
		conn, err := m.listener.Accept()
		if err != nil {
			<-m.handshakes
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			// Of want of descriptors or memory, or of the stranger: it passes.
			m.log.Warn("cannot accept a connection", "error", err, "retry", pause)
			if !m.rest(pause) {
				return nil
			}
			pause = min(2*pause, acceptLast)
			continue
		}
		pause = acceptFirst
		m.wg.Go(func() { m.meet(ctx, conn) })
	}
}

// The pauses after a connection could not be accepted.
const (
	acceptFirst = 5 * time.Millisecond
	acceptLast  = time.Second
)

// rest waits, and says whether the port is still open.
func (m *mux) rest(pause time.Duration) bool {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-m.done:
		return false
	}
}

// meet does one handshake and hands the connection on.
func (m *mux) meet(ctx context.Context, raw net.Conn) {
	conn := tls.Server(raw, m.config)
	hctx, cancel := context.WithTimeout(ctx, m.timeout)
	err := conn.HandshakeContext(hctx)
	cancel()
	<-m.handshakes
	if err != nil {
		m.refuse(conn, err)
		return
	}
	state := conn.ConnectionState()
	role, name, err := pki.Peer(state)
	if err != nil {
		m.refuse(conn, err)
		return
	}
	select {
	case m.connections <- struct{}{}:
	default:
		m.refuse(conn, errors.New("too many connections"))
		return
	}
	release := sync.OnceFunc(func() { <-m.connections })
	switch state.NegotiatedProtocol {
	case pki.ALPNAPI:
		select {
		case m.api <- &countedConn{Conn: conn, state: state, release: release}:
		case <-m.done:
			release()
			m.refuse(conn, errors.New("the agent is stopping"))
		}
	case pki.ALPNMigrate:
		defer release()
		if role != pki.Host {
			m.refuse(conn, fmt.Errorf("%s %s may not use the data plane: only hosts may", role, name))
			return
		}
		m.migrate(ctx, conn, name)
	default:
		release()
		m.refuse(conn, fmt.Errorf("%s %s chose no protocol", role, name))
	}
}

func (m *mux) refuse(conn net.Conn, why error) {
	m.log.Warn("connection refused", "remote", conn.RemoteAddr().String(), "error", why)
	if err := conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		m.log.Debug("close a refused connection", "error", err)
	}
}

// close ends the accepting; connections that were handed on live.
func (m *mux) close() error {
	var err error
	m.once.Do(func() {
		close(m.done)
		err = m.listener.Close()
	})
	return err
}

// Accept, Close and Addr make the API's share of the port a net.Listener.
func (m *mux) Accept() (net.Conn, error) {
	select {
	case conn := <-m.api:
		return conn, nil
	case <-m.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (m *mux) Close() error { return m.close() }

// Addr implements net.Listener.
func (m *mux) Addr() net.Addr { return m.listener.Addr() }

// countedConn is an API connection whose handshake has been done.
type countedConn struct {
	net.Conn
	state   tls.ConnectionState
	release func()
}

func (c *countedConn) Close() error {
	c.release()
	return c.Conn.Close()
}

// handshaken is the transport security of connections that have theirs already:
// those of the mux, and of the unix socket, whose other end the kernel names.
type handshaken struct{}

// socketInfo says who is at the other end of a unix socket.
type socketInfo struct {
	credentials.CommonAuthInfo
	uid uint32
}

// AuthType implements credentials.AuthInfo.
func (socketInfo) AuthType() string { return "unix" }

// ServerHandshake implements credentials.TransportCredentials.
func (handshaken) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	common := credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}
	switch c := conn.(type) {
	case *countedConn:
		return c, credentials.TLSInfo{State: c.state, CommonAuthInfo: common}, nil
	case *net.UnixConn:
		uid, err := peerUID(c)
		if err != nil {
			return nil, nil, err
		}
		return c, socketInfo{CommonAuthInfo: common, uid: uid}, nil
	}
	return nil, nil, fmt.Errorf("agent: a connection of type %T is not authenticated", conn)
}

// ClientHandshake implements credentials.TransportCredentials.
func (handshaken) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("agent: these credentials are a server's")
}

// Info implements credentials.TransportCredentials.
func (handshaken) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (h handshaken) Clone() credentials.TransportCredentials { return h }

// OverrideServerName implements credentials.TransportCredentials.
func (handshaken) OverrideServerName(string) error { return nil }
