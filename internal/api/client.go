package api

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/pki"
)

// MaxMessage bounds a message in either direction, in bytes.
const MaxMessage = 4 << 20

// KeepaliveTime is how often a silent connection is looked after. An agent that
// was away is found again within seconds of its return, and one
// that is silent is given up as soon: what is in doubt waits for that.
const (
	KeepaliveTime    = 10 * time.Second
	keepaliveTimeout = 5 * time.Second
	redialMax        = time.Second
)

// Target is an agent to talk to: by its unix socket or, with an identity, over
// the network.
type Target struct {
	Socket   string
	Address  string // host:port
	Identity *pki.Identity
	// Host is the name of the host that must answer at Address. If empty, the
	// host's certificate must name what was dialled.
	Host string
}

// Client is a connection to an agent. Its errors are *Error.
type Client struct {
	Guests     lmctlv1.GuestsClient
	Migrations lmctlv1.MigrationsClient
	Hosts      lmctlv1.HostsClient
	Peer       lmctlv1.PeerClient

	conn *grpc.ClientConn
}

// Dial prepares a client. It connects when it is first used.
func Dial(t Target) (*Client, error) {
	opts := []grpc.DialOption{
		grpc.WithUnaryInterceptor(unaryErrors),
		grpc.WithStreamInterceptor(streamErrors),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage)),
		grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: redialMax},
			MinConnectTimeout: keepaliveTimeout,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: KeepaliveTime, Timeout: keepaliveTimeout, PermitWithoutStream: true}),
	}
	target := "passthrough:///agent"
	switch {
	case t.Socket != "" && t.Address == "":
		opts = append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", t.Socket)
			}))
	case t.Address != "" && t.Identity != nil:
		host, _, err := net.SplitHostPort(t.Address)
		if err != nil {
			return nil, fmt.Errorf("api: address %q: %w", t.Address, err)
		}
		config := t.Identity.ClientConfig(pki.ALPNAPI, pki.Expect{Host: t.Host, Address: host})
		target = "passthrough:///" + t.Address
		opts = append(opts, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	default:
		return nil, errors.New("api: an agent is reached by its socket, or by address with a certificate")
	}
	conn, err := grpc.NewClient(target, opts...)
	if err != nil {
		return nil, fmt.Errorf("api: %w", err)
	}
	return NewClient(conn), nil
}

// NewClient makes a client of a connection, which it then owns.
func NewClient(conn *grpc.ClientConn) *Client {
	return &Client{
		Guests:     lmctlv1.NewGuestsClient(conn),
		Migrations: lmctlv1.NewMigrationsClient(conn),
		Hosts:      lmctlv1.NewHostsClient(conn),
		Peer:       lmctlv1.NewPeerClient(conn),
		conn:       conn,
	}
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// ParseAgent reads an agent's address as the command line has it: host:port or
// NAME@host:port, where NAME is the host that must answer.
func ParseAgent(s string) (host, address string, err error) {
	if name, rest, ok := strings.Cut(s, "@"); ok {
		if err := pki.CheckName(name); err != nil {
			return "", "", err
		}
		host, s = name, rest
	}
	if h, port, err := net.SplitHostPort(s); err != nil || h == "" || port == "" {
		return "", "", fmt.Errorf("api: agent %q: must be host:port or NAME@host:port", s)
	}
	return host, s, nil
}

func unaryErrors(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return FromStatus(invoker(ctx, method, req, reply, cc, opts...))
}

func streamErrors(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := streamer(ctx, desc, cc, method, opts...)
	if err != nil {
		return nil, FromStatus(err)
	}
	return &errorStream{s}, nil
}

// errorStream is a stream whose errors are *Error, except io.EOF.
type errorStream struct{ grpc.ClientStream }

func (s *errorStream) RecvMsg(m any) error { return FromStatus(s.ClientStream.RecvMsg(m)) }
func (s *errorStream) SendMsg(m any) error { return FromStatus(s.ClientStream.SendMsg(m)) }
