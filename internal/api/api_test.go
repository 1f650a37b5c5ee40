package api

import (
	"context"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestErrorCrosses(t *testing.T) {
	in := &Error{Code: codes.FailedPrecondition, Operation: "migrate guest", Object: "web1", Cause: "no bridge br0; no disk",
		Result: "refused", Reasons: []string{"no bridge br0", "no disk"}}
	if got := in.Error(); got != "migrate guest web1: no bridge br0; no disk" {
		t.Errorf("in words: %s", got)
	}
	// What grpc-go does on the way.
	s, ok := status.FromError(in)
	if !ok {
		t.Fatal("no status")
	}
	var out *Error
	if err := FromStatus(status.FromProto(s.Proto()).Err()); !errors.As(err, &out) {
		t.Fatalf("came out as %v", err)
	}
	out.Err = nil
	if !reflect.DeepEqual(in, out) {
		t.Errorf("went in as %+v, came out as %+v", in, out)
	}
}

func TestFromStatus(t *testing.T) {
	if err := FromStatus(nil); err != nil {
		t.Errorf("nil became %v", err)
	}
	if err := FromStatus(io.EOF); err != io.EOF { //nolint:errorlint // it must be the very one
		t.Errorf("EOF became %v", err)
	}
	if err := FromStatus(status.Error(codes.Canceled, "x")); !errors.Is(err, context.Canceled) {
		t.Errorf("%v is not context.Canceled", err)
	}
	if err := FromStatus(status.Error(codes.DeadlineExceeded, "x")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v is not context.DeadlineExceeded", err)
	}
	first := FromStatus(status.Error(codes.NotFound, "x"))
	if again := FromStatus(first); again != first { //nolint:errorlint // it must be the very one
		t.Errorf("turned twice: %v", again)
	}
}

func TestUnreachableAgent(t *testing.T) {
	c, err := Dial(Target{Socket: t.TempDir() + "/none.sock"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.Guests.List(t.Context(), nil)
	var e *Error
	if !errors.As(err, &e) || e.Code != codes.Unavailable || e.Operation != "reach the agent" || !strings.Contains(e.Cause, "none.sock") {
		t.Errorf("%#v", err)
	}
}

func TestDialNeedsATarget(t *testing.T) {
	for _, target := range []Target{{}, {Address: "host:7410"}, {Socket: "/s", Address: "host:7410"}} {
		if c, err := Dial(target); err == nil {
			t.Errorf("%+v: dialled", target)
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestParseAgent(t *testing.T) {
	for _, tc := range []struct {
		in, host, addr string
		ok             bool
	}{
		{"10.0.0.1:7410", "", "10.0.0.1:7410", true},
		{"alpha@[2001:db8::1]:7410", "alpha", "[2001:db8::1]:7410", true},
		{"alpha", "", "", false},
		{"al/pha@x:1", "", "", false},
		{":7410", "", "", false},
		{"x:", "", "", false},
	} {
		host, addr, err := ParseAgent(tc.in)
		if (err == nil) != tc.ok || host != tc.host || addr != tc.addr {
			t.Errorf("%q: %q %q %v", tc.in, host, addr, err)
		}
	}
}
