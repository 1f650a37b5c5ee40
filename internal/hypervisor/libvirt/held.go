package libvirt

import (
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/lmctl/lmctl/internal/hypervisor/qemu/devstate"
)

// maxHeld bounds the state that is held, in bytes: that of the devices, and all
// memory that is not in shared files (a display's, a firmware's).
const maxHeld = 256 << 20

// heldWriter keeps what is written until it is released. Libvirt has QEMU go on
// from the stop to its devices' state before we know of the stop, and nothing in
// the stream tells where that lies. The destination must not load any of it
// before the last pages are in place: a device looks at memory when it is loaded,
// and KVM writes to it.
type heldWriter struct {
	w    io.Writer
	acks bool // QEMU knows what it is to allow the switchover

	mu       sync.Mutex
	held     []byte
	released bool
}

// Write implements io.Writer.
func (h *heldWriter) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.released {
		return h.w.Write(p)
	}
	if len(h.held)+len(p) > maxHeld {
		return 0, fmt.Errorf("QEMU writes more than %d bytes before it stops the guest", maxHeld)
	}
	h.held = append(h.held, p...)
	return len(p), nil
}

// from keeps the device state that QEMU says, rewritten on the way. Libvirt 11
// turns switchover-ack on whenever both QEMUs have it, and the destination's
// hears of nothing before the guest stands still: the source would go round and
// round until then, at every turn with an event, of which libvirtd chokes.
func (h *heldWriter) from(conn *net.UnixConn) error { return devstate.Converse(h, conn, h.acks) }

// release passes on what was kept, and lets the rest pass.
func (h *heldWriter) release() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.released = true
	_, err := h.w.Write(h.held)
	h.held = nil
	return err
}
