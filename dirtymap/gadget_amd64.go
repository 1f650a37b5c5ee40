package dirtymap

import (
	"bytes"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
)

// gadgets are the places in a process' own code that the injection runs.
type gadgets struct {
	call     uint64 // syscall; ret
	restorer uint64 // mov $15, %eax or %rax; syscall
	// the code found at restorer
	restorerCode []byte
}

var (
	callCode      = []byte{0x0f, 0x05, 0xc3}
	restorerCodes = [...][]byte{
		{0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05}, // glibc, musl
		{0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05},             // Go
	}
)

// findGadgets searches the executable mappings of a process. Every program
// that handles signals has a restorer, and the C library or the vDSO a call.
func findGadgets(pid int) (gadgets, error) {
	maps, err := sys.Maps(pid)
	if err != nil {
		return gadgets{}, fmt.Errorf("find code to call: %w", classify(err))
	}
	var g gadgets
	buf := make([]byte, 1<<20)
	for _, m := range maps {
		if !m.Exec || !m.Read || m.Path == "[vsyscall]" {
			continue
		}
		if err := g.search(pid, m, buf); err != nil {
			return gadgets{}, err
		}
		if g.call != 0 && g.restorer != 0 {
			return g, nil
		}
	}
	missing := "syscall; ret"
	if g.call != 0 {
		missing = "a signal restorer"
	}
	return gadgets{}, fmt.Errorf("%w: the code of process %d holds no %s", ErrUnsupported, pid, missing)
}

// search looks through one mapping, by pieces that overlap by the longest code.
// A mapping that cannot be read, of a device for one, holds nothing for us.
func (g *gadgets) search(pid int, m sys.Mapping, buf []byte) error {
	const overlap = 16
	for at := m.Start; at < m.End; {
		b := buf[:min(uint64(len(buf)), m.End-at)]
		switch err := sys.ReadMemory(pid, at, b); {
		case errors.Is(err, unix.EFAULT), errors.Is(err, unix.EIO):
			return nil
		case err != nil:
			return fmt.Errorf("read code: %w", classify(err))
		}
		if i := bytes.Index(b, callCode); i >= 0 && g.call == 0 {
			g.call = at + uint64(i)
		}
		for _, code := range restorerCodes {
			if i := bytes.Index(b, code); i >= 0 && g.restorer == 0 {
				g.restorer, g.restorerCode = at+uint64(i), code
			}
		}
		if g.call != 0 && g.restorer != 0 || at+uint64(len(b)) == m.End {
			return nil
		}
		at += uint64(len(b)) - overlap
	}
	return nil
}

// verify checks, with the thread stopped, that the code is still there.
func (g *gadgets) verify(pid int) error {
	for _, c := range []struct {
		addr uint64
		code []byte
	}{{g.call, callCode}, {g.restorer, g.restorerCode}} {
		b := make([]byte, len(c.code))
		if err := sys.ReadMemory(pid, c.addr, b); err != nil {
			return classify(err)
		}
		if !bytes.Equal(b, c.code) {
			return fmt.Errorf("code at %#x of process %d has changed", c.addr, pid)
		}
	}
	return nil
}
