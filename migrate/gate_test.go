package migrate

import (
	"errors"
	"io"
	"testing"
	"testing/synctest"
)

// TestGateHoldsStateBack reads beside the writer: state from before the stop
// passes, state from after it only once the gate is released.
func TestGateHoldsStateBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		var got []byte
		end := make(chan error, 1)
		go func() {
			b := make([]byte, 3)
			for {
				n, err := g.Read(b)
				got = append(got, b[:n]...)
				if err != nil {
					end <- err
					return
				}
			}
		}()
		steps := []struct {
			do   func() error
			want string
		}{
			{func() error { return g.write([]byte("early")) }, "early"},
			{func() error { return g.write([]byte(" too")) }, "early too"},
			{g.stopped, "early too"},
			{func() error { return g.write([]byte(", late")) }, "early too"},
			{func() error { return g.end(15) }, "early too"},
			{func() error { g.release(); return nil }, "early too, late"},
		}
		for i, s := range steps {
			if err := s.do(); err != nil {
				t.Fatalf("step %d: %v", i, err)
			}
			synctest.Wait()
			if string(got) != s.want {
				t.Fatalf("step %d: %q was read, want %q", i, got, s.want)
			}
		}
		if err := <-end; err != io.EOF {
			t.Fatalf("ended with %v", err)
		}
	})
}

func TestGateRefuses(t *testing.T) {
	fresh := func() *gate {
		g := newGate()
		if err := g.write([]byte("abc")); err != nil {
			t.Fatal(err)
		}
		return g
	}
	for name, bad := range map[string]func(*gate) error{
		"end before the stop": func(g *gate) error { return g.end(3) },
		"second stop":         func(g *gate) error { _ = g.stopped(); return g.stopped() },
		"wrong length":        func(g *gate) error { _ = g.stopped(); return g.end(4) },
		"after the end":       func(g *gate) error { _ = g.stopped(); _ = g.end(3); return g.write([]byte("d")) },
	} {
		if err := bad(fresh()); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestGateFailEndsRead(t *testing.T) {
	g := newGate()
	want := errors.New("gone")
	g.fail(want)
	if _, err := g.Read(make([]byte, 1)); !errors.Is(err, want) {
		t.Fatalf("read: %v", err)
	}
}
