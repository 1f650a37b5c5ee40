package api

import (
	"context"
	"errors"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
)

// Error is an error of an operation that was asked of an agent. It crosses the
// wire as a status with an ErrorDetail.
type Error struct {
	Code      codes.Code `json:"-"`
	Operation string     `json:"operation"`         // what was asked for, like "start guest"
	Object    string     `json:"object,omitempty"`  // of what, like the guest's name
	Cause     string     `json:"cause"`             // in words
	Result    string     `json:"result,omitempty"`  // of a migration: refused, failed, cancelled, in-doubt
	Reasons   []string   `json:"reasons,omitempty"` // of a refusal, one each

	// Err is the error itself, on the side where it happened.
	Err error `json:"-"`
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Operation)
	if e.Object != "" {
		b.WriteString(" " + e.Object)
	}
	// A cause from the place itself may begin with what was done there.
	if b.Len() == 0 || strings.HasPrefix(e.Cause, b.String()+": ") || e.Object == "" && strings.HasPrefix(e.Cause, e.Operation+" ") {
		return e.Cause
	}
	return b.String() + ": " + e.Cause
}

func (e *Error) Unwrap() error { return e.Err }

// GRPCStatus makes the error a status, for grpc-go.
func (e *Error) GRPCStatus() *status.Status {
	s := status.New(e.Code, e.Error())
	detailed, err := s.WithDetails(&lmctlv1.ErrorDetail{
		Operation: e.Operation, Object: e.Object, Cause: e.Cause, Result: e.Result, Reasons: e.Reasons,
	})
	if err != nil { // only for codes.OK, which is no error
		return s
	}
	return detailed
}

// FromStatus turns an error of a gRPC call back into an *Error. What is not a
// status stays what it is.
func FromStatus(err error) error {
	if err == nil {
		return nil
	}
	if e := (*Error)(nil); errors.As(err, &e) {
		return err
	}
	s, ok := status.FromError(err)
	if !ok {
		return err
	}
	e := &Error{Code: s.Code(), Cause: s.Message(), Err: err}
	for _, d := range s.Details() {
		if detail, ok := d.(*lmctlv1.ErrorDetail); ok {
			e.Operation, e.Object, e.Cause = detail.Operation, detail.Object, detail.Cause
			e.Result, e.Reasons = detail.Result, detail.Reasons
			return e
		}
	}
	switch s.Code() {
	case codes.Unavailable:
		e.Operation, e.Cause = "reach the agent", strings.TrimPrefix(e.Cause, "connection error: desc = ")
		if strings.Contains(e.Cause, "dial unix") {
			e.Cause += "; does an agent run on this host (lmctl agent), and are you root?"
		}
	case codes.Canceled:
		e.Err = errors.Join(err, context.Canceled)
	case codes.DeadlineExceeded:
		e.Err = errors.Join(err, context.DeadlineExceeded)
	case codes.PermissionDenied, codes.Unauthenticated:
		e.Operation = "permission"
	}
	return e
}
