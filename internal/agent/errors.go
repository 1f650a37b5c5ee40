package agent

import (
	"context"
	"errors"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/qemu"
	"github.com/lmctl/lmctl/internal/ledger"
	"github.com/lmctl/lmctl/migrate"
)

// named is a request that is about a guest.
type named interface{ GetName() string }

func (a *Agent) errorsUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	resp, err := next(ctx, req)
	if err == nil {
		return resp, nil
	}
	object := ""
	if n, ok := req.(named); ok {
		object = n.GetName()
	}
	return nil, a.toStatus(info.FullMethod, object, err)
}

func (a *Agent) errorsStream(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := next(srv, s); err != nil {
		return a.toStatus(info.FullMethod, "", err)
	}
	return nil
}

// toStatus makes any error of a method one that says operation, object and
// cause to a machine too.
func (a *Agent) toStatus(method, object string, err error) error {
	var known *api.Error
	if errors.As(err, &known) {
		return known.GRPCStatus().Err()
	}
	if s, ok := status.FromError(err); ok {
		return s.Err()
	}
	e := &api.Error{Code: codeOf(err), Operation: operationOf(method), Object: object, Cause: err.Error()}
	var refusal *migrate.Refusal
	if errors.As(err, &refusal) {
		e.Result, e.Reasons = string(migrate.Refused), refusal.Reasons
	}
	var bad *qemu.DefinitionError
	if errors.As(err, &bad) {
		for _, p := range bad.Problems {
			e.Reasons = append(e.Reasons, p.String())
		}
	}
	if e.Code == codes.Unknown {
		a.log.Error("request failed", "method", method, "object", object, "error", err)
	}
	return e.GRPCStatus().Err()
}

// operationOf is a method in words: "start guest" for lmctl.v1.Guests/Start.
func operationOf(method string) string {
	service, name, _ := strings.Cut(strings.TrimPrefix(method, "/lmctl.v1."), "/")
	return strings.ToLower(name + " " + strings.TrimSuffix(service, "s"))
}

func codeOf(err error) codes.Code {
	var (
		bad   *qemu.DefinitionError
		busy  *hypervisor.BusyError
		state *hypervisor.StateError
		owner *ledger.StateError
		refus *migrate.Refusal
	)
	switch {
	case errors.Is(err, hypervisor.ErrNotFound):
		return codes.NotFound
	case errors.Is(err, hypervisor.ErrExists):
		return codes.AlreadyExists
	case errors.As(err, &bad):
		return codes.InvalidArgument
	case errors.As(err, &busy), errors.As(err, &state), errors.As(err, &owner), errors.As(err, &refus):
		return codes.FailedPrecondition
	case errors.Is(err, hypervisor.ErrStillRunning), errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	}
	return codes.Unknown
}
