package migrate

import (
	"io"
	"sync"
)

// maxHeldState bounds the device state that waits for the hypervisor to read
// it: far above any guest's, far below any host's memory.
const maxHeldState = 256 << 20

// gate is the device state on its way to the shell. What came before the guest
// stopped passes at once; what came after waits until every page is in place,
// because devices read guest memory when they load (virtio looks at its rings).
type gate struct {
	mu      sync.Mutex
	changed sync.Cond
	held    []byte
	read    int64 // bytes read so far
	written int64
	stop    int64 // bytes written before the stop, -1 while the guest runs
	open    bool
	ended   bool
	err     error

	started chan struct{} // closed by the first write
}

func newGate() *gate {
	g := &gate{stop: -1, started: make(chan struct{})}
	g.changed.L = &g.mu
	return g
}

// write adds state that has arrived.
func (g *gate) write(p []byte) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.ended:
		return violation("device state after its end")
	case len(g.held)+len(p) > maxHeldState:
		return violation("more than %d bytes of device state", maxHeldState)
	}
	if g.written == 0 && len(p) > 0 {
		close(g.started)
	}
	g.held = append(g.held, p...)
	g.written += int64(len(p))
	g.changed.Broadcast()
	return nil
}

// stopped marks that the guest is stopped: what follows waits.
func (g *gate) stopped() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stop >= 0 {
		return violation("the guest stopped twice")
	}
	g.stop = g.written
	return nil
}

// release lets the rest pass.
func (g *gate) release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open = true
	g.changed.Broadcast()
}

// end says that all of the state, so many bytes, has arrived.
func (g *gate) end(bytes int64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.stop < 0 || g.ended:
		return violation("end of device state where none was due")
	case bytes != g.written || bytes == 0:
		return violation("%d bytes of device state arrived, %d were sent", g.written, bytes)
	}
	g.ended = true
	g.changed.Broadcast()
	return nil
}

// fail ends a Read that waits.
func (g *gate) fail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err == nil {
		g.err = err
	}
	g.changed.Broadcast()
}

// Read implements io.Reader for the one who loads the state.
func (g *gate) Read(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for {
		if g.err != nil {
			return 0, g.err
		}
		n := len(g.held)
		if !g.open && g.stop >= 0 {
			n = int(max(0, min(int64(n), g.stop-g.read)))
		}
		if n > 0 {
			n = copy(p, g.held[:n])
			g.held = g.held[n:]
			g.read += int64(n)
			return n, nil
		}
		if g.ended && len(g.held) == 0 {
			return 0, io.EOF
		}
		g.changed.Wait()
	}
}
