package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/lmctl/lmctl/internal/lab/domain"
	"github.com/lmctl/lmctl/internal/sys"
)

// Memory is the memory of a guest while it is on a host, as its RAM lies in
// QEMU's files, one after the other. Addresses above the PCI hole are closed up.
type Memory struct{ parts []part }

// part is a file with some of a guest's memory.
type part struct {
	path string // it can be opened as long as QEMU runs
	base int64  // where in it the memory begins
	size int64
	f    *os.File
}

// OpenMemory opens a guest's memory for reading. Whoever calls it closes it.
func (l *Lab) OpenMemory(host string, g Guest) (*Memory, error) {
	parts, err := l.memoryParts(host, g)
	if err != nil {
		return nil, err
	}
	m := &Memory{parts: parts}
	for i := range m.parts {
		if m.parts[i].f, err = os.Open(m.parts[i].path); err != nil {
			return nil, errors.Join(fmt.Errorf("lab: memory of guest %s: %w", g.Name, err), m.Close())
		}
	}
	return m, nil
}

// Close lets go of the memory.
func (m *Memory) Close() error {
	var errs []error
	for _, p := range m.parts {
		if p.f != nil {
			errs = append(errs, p.f.Close())
		}
	}
	return errors.Join(errs...)
}

// ReadAt reads from the guest's memory.
func (m *Memory) ReadAt(b []byte, off int64) (n int, err error) {
	for _, p := range m.parts {
		if off >= p.size {
			off -= p.size
			continue
		}
		k, err := p.f.ReadAt(b[n:n+int(min(int64(len(b)-n), p.size-off))], p.base+off)
		n += k
		if err != nil || n == len(b) {
			return n, err
		}
		off = 0
	}
	return n, fmt.Errorf("lab: beyond the end of the guest's memory: %w", os.ErrInvalid)
}

// MemoryFile is where a guest's memory is while it is on a host; the first file
// of it, if there are several. It is the path of no file if the guest is not
// there, or its memory is no file.
func (l *Lab) MemoryFile(host string, g Guest) string {
	parts, err := l.memoryParts(host, g)
	if err != nil || parts[0].base != 0 {
		return filepath.Join(l.MemoryDir(host), g.UUID+".ram")
	}
	return parts[0].path
}

// MemoryWord says where a word of a guest's memory is, by its place in Memory:
// for flat.Probe, which maps it.
func (l *Lab) MemoryWord(host string, g Guest, off int64) (path string, at int64, err error) {
	parts, err := l.memoryParts(host, g)
	if err != nil {
		return "", 0, err
	}
	for _, p := range parts {
		switch {
		case off >= p.size:
			off -= p.size
		case strings.HasSuffix(p.path, "/mem"):
			return "", 0, fmt.Errorf("lab: memory of guest %s is private to QEMU: nobody else can map it", g.Name)
		default:
			return p.path, p.base + off, nil
		}
	}
	return "", 0, fmt.Errorf("lab: guest %s has no memory at %#x", g.Name, off)
}

func (l *Lab) memoryParts(host string, g Guest) ([]part, error) {
	if l.Hypervisor() != Libvirt {
		return []part{{path: filepath.Join(l.MemoryDir(host), g.UUID+".ram"), size: g.Memory}}, nil
	}
	parts, err := l.domainMemory(host, g)
	if err != nil {
		return nil, fmt.Errorf("lab: memory of guest %s on %s: %w", g.Name, host, err)
	}
	return parts, nil
}

// domainMemory finds the memory of libvirt's guest. libvirt 9.0 calls it
// DIRECTORY/libvirt/qemu/ID-NAME/pc.ram, or ram-node0 and so on.
func (l *Lab) domainMemory(host string, g Guest) ([]part, error) {
	var paths []string
	var err error
	switch g.Shape.Backing {
	case domain.Private:
		return l.privateMemory(host, g)
	case domain.Memfd:
		paths, err = l.memfds(host, g.Name)
	default:
		paths, err = l.memoryFiles(host, g.Name)
	}
	if err != nil {
		return nil, err
	}
	if want := max(1, g.Shape.Nodes); len(paths) != want {
		return nil, fmt.Errorf("%d files, not %d: %q", len(paths), want, paths)
	}
	parts := make([]part, 0, len(paths))
	for _, p := range paths {
		parts = append(parts, part{path: p, size: g.Memory / int64(len(paths))})
	}
	return parts, nil
}

func (l *Lab) memoryFiles(host, name string) ([]string, error) {
	dir := filepath.Join(l.MemoryDir(host), "libvirt", "qemu")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	latest := -1
	for _, e := range entries {
		digits, of, _ := strings.Cut(e.Name(), "-")
		if id, err := strconv.Atoi(digits); err == nil && of == name {
			latest = max(latest, id)
		}
	}
	if latest < 0 {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, "ID-"+name), os.ErrNotExist)
	}
	return filepath.Glob(filepath.Join(dir, fmt.Sprintf("%d-%s", latest, name), "*ram*"))
}

// domainPID is the process of a domain.
func (l *Lab) domainPID(host, name string) (int, error) {
	b, err := os.ReadFile(l.Outside(host, "/run/libvirt/qemu/"+name+".pid"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// memfds are a domain's memory files that have no name, in the order in which
// QEMU made them.
func (l *Lab) memfds(host, name string) ([]string, error) {
	pid, err := l.domainPID(host, name)
	if err != nil {
		return nil, err
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var fds []int
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if fd, err2 := strconv.Atoi(e.Name()); err == nil && err2 == nil && strings.HasPrefix(target, "/memfd:memory-backend-memfd") {
			fds = append(fds, fd)
		}
	}
	slices.Sort(fds)
	paths := make([]string, 0, len(fds))
	for _, fd := range fds {
		paths = append(paths, fmt.Sprintf("%s/%d", dir, fd))
	}
	return paths, nil
}

// privateMemory finds a domain's memory in its process: QEMU maps it in one
// piece.
func (l *Lab) privateMemory(host string, g Guest) ([]part, error) {
	pid, err := l.domainPID(host, g.Name)
	if err != nil {
		return nil, err
	}
	maps, err := sys.Maps(pid)
	if err != nil {
		return nil, err
	}
	var found []part
	for _, m := range maps {
		if size := int64(m.End - m.Start); m.Inode == 0 && m.Write && !m.Shared && size == g.Memory {
			found = append(found, part{path: fmt.Sprintf("/proc/%d/mem", pid), base: int64(m.Start), size: size})
		}
	}
	if len(found) != 1 {
		return nil, fmt.Errorf("process %d has %d mappings of %d bytes", pid, len(found), g.Memory)
	}
	return found, nil
}
