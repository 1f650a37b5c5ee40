package libvirt

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

// Nothing passes before it is released, and everything in its order after.
func TestHeldWriter(t *testing.T) {
	var out bytes.Buffer
	h := &heldWriter{w: &out}
	for _, p := range []string{"early ", "state, "} {
		if n, err := h.Write([]byte(p)); n != len(p) || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
	}
	if out.Len() > 0 {
		t.Fatalf("%q has passed before the stop", out.String())
	}
	if err := h.release(); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Write([]byte("the rest")); err != nil || out.String() != "early state, the rest" {
		t.Errorf("%q, %v", out.String(), err)
	}
}

func TestHeldWriterBounds(t *testing.T) {
	h := &heldWriter{w: io.Discard, held: make([]byte, maxHeld)}
	if _, err := h.Write([]byte{0}); err == nil {
		t.Error("more than the bound was held")
	}
	broken := &heldWriter{w: brokenWriter{}}
	if err := broken.release(); !errors.Is(err, errBroken) {
		t.Errorf("a broken destination: %v", err)
	}
}

var errBroken = errors.New("broken")

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errBroken }
