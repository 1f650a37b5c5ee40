package agent

import (
	"context"
	"fmt"
	"net"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/pki"
)

// caller is who asks.
type caller struct {
	root bool     // over the unix socket
	role pki.Role // otherwise
	name string
}

func (c caller) String() string {
	if c.root {
		return "root"
	}
	return string(c.role) + " " + c.name
}

// callerOf says who makes a call.
func callerOf(ctx context.Context) (caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return caller{}, status.Error(codes.Unauthenticated, "nobody knows who asks")
	}
	switch info := p.AuthInfo.(type) {
	case socketInfo:
		if info.uid != 0 {
			return caller{}, status.Errorf(codes.PermissionDenied, "only root may use the agent's socket, not user %d", info.uid)
		}
		return caller{root: true}, nil
	case credentials.TLSInfo:
		role, name, err := pki.Peer(info.State)
		if err != nil {
			return caller{}, status.Error(codes.Unauthenticated, err.Error())
		}
		return caller{role: role, name: name}, nil
	}
	return caller{}, status.Error(codes.Unauthenticated, "the connection is not authenticated")
}

// authorize says whether the caller may use a method.
func authorize(ctx context.Context, method string) error {
	c, err := callerOf(ctx)
	if err != nil {
		return err
	}
	service, _, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	switch service {
	case lmctlv1.Guests_ServiceDesc.ServiceName, lmctlv1.Migrations_ServiceDesc.ServiceName, lmctlv1.Hosts_ServiceDesc.ServiceName:
		if c.root || c.role == pki.Operator {
			return nil
		}
	case lmctlv1.Peer_ServiceDesc.ServiceName:
		if c.role == pki.Host {
			return nil
		}
	}
	return status.Errorf(codes.PermissionDenied, "%s may not use %s", c, strings.TrimPrefix(service, "lmctl.v1."))
}

func authorizeUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := authorize(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func authorizeStream(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := authorize(s.Context(), info.FullMethod); err != nil {
		return err
	}
	return next(srv, s)
}

// peerUID asks the kernel whose process is at the other end.
func peerUID(conn *net.UnixConn) (uint32, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("agent: socket: %w", err)
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, fmt.Errorf("agent: socket: %w", err)
	}
	if cerr != nil {
		return 0, fmt.Errorf("agent: who is at the socket: %w", cerr)
	}
	return cred.Uid, nil
}
