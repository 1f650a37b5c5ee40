package migrate

import (
	"io"
	"sync"
)

// maxAnswers bounds what waits for a hypervisor to be read, in bytes. Its
// answers are some bytes each, and there is one for each that it asks for.
const maxAnswers = 1 << 20

// answers are bytes on their way from one hypervisor to the other, against the
// stream. Writing never waits.
type answers struct {
	mu      sync.Mutex
	changed sync.Cond
	held    []byte
	closed  bool
}

func newAnswers() *answers {
	a := &answers{}
	a.changed.L = &a.mu
	return a
}

func (a *answers) write(p []byte) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.held)+len(p) > maxAnswers {
		return violation("more than %d bytes of answers", maxAnswers)
	}
	a.held = append(a.held, p...)
	a.changed.Broadcast()
	return nil
}

// close ends what is read once all of it has been.
func (a *answers) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	a.changed.Broadcast()
}

// Read implements io.Reader.
func (a *answers) Read(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for len(a.held) == 0 {
		if a.closed {
			return 0, io.EOF
		}
		a.changed.Wait()
	}
	n := copy(p, a.held)
	a.held = a.held[n:]
	return n, nil
}
