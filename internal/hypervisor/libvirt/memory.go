package libvirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
	"github.com/lmctl/lmctl/migrate"
)

// backend is a memory backend of a QEMU, as libvirt gave it on the command line:
// a block of the guest's RAM.
type backend struct {
	Kind  string `json:"qom-type"` // memory-backend-file, -memfd or -ram
	ID    string `json:"id"`
	Path  string `json:"mem-path"` // of a file, or a folder for a nameless one
	Share bool   `json:"share"`
	Size  int64  `json:"size"` // bytes
}

// backends reads a QEMU's command line. It is the one account of its memory that
// can be had at the destination too, where libvirt lets nobody ask QEMU.
func (p *process) backends() ([]backend, error) {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.pid))
	if err != nil {
		return nil, fmt.Errorf("memory of process %d: %w", p.pid, err)
	}
	var all []backend
	args := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
	for i, a := range args[:len(args)-1] {
		value := args[i+1]
		if a != "-object" || !strings.HasPrefix(value, "{") {
			continue
		}
		var b backend
		if err := json.Unmarshal([]byte(value), &b); err != nil {
			return nil, fmt.Errorf("memory of process %d: argument %q: %w", p.pid, value, err)
		}
		if strings.HasPrefix(b.Kind, "memory-backend-") {
			all = append(all, b)
		}
	}
	return all, nil
}

// why says why a backend cannot be copied directly, or nothing.
func (b backend) why() string {
	switch {
	case b.Kind == "memory-backend-ram":
		return "is private memory; set <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>"
	case !b.Share:
		return "is not shared; set <access mode='shared'/> in its <memoryBacking>"
	case b.Kind == "memory-backend-file" && isFolder(b.Path):
		return "lies on huge pages, which are not tracked page by page"
	}
	return ""
}

func isFolder(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// obstacles says what forbids to copy the memory of a process, if there is one.
func (p *process) obstacles() []string {
	if p == nil {
		return nil
	}
	backends, err := p.backends()
	if err != nil {
		return []string{err.Error()}
	}
	if len(backends) == 0 {
		return []string{"its memory " + backend{Kind: "memory-backend-ram"}.why()}
	}
	var reasons []string
	for _, b := range backends {
		if why := b.why(); why != "" {
			reasons = append(reasons, fmt.Sprintf("memory %s %s", b.ID, why))
		}
	}
	return reasons
}

// blocks opens the memory of a QEMU. With addresses, which are those of the
// process's own mappings.
func (p *process) blocks() (blocks []migrate.Memory, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, closeBlocks(blocks))
			blocks = nil
		}
	}()
	backends, err := p.backends()
	if err != nil {
		return nil, err
	}
	if len(backends) == 0 {
		return nil, fmt.Errorf("process %d has no memory backend on its command line", p.pid)
	}
	maps, err := sys.Maps(p.pid)
	if err != nil {
		return nil, err
	}
	for _, b := range backends {
		if why := b.why(); why != "" {
			return blocks, fmt.Errorf("memory %s %s", b.ID, why)
		}
		m, err := p.open(b, backends, maps)
		if err != nil {
			return blocks, fmt.Errorf("memory %s of process %d: %w", b.ID, p.pid, err)
		}
		blocks = append(blocks, m)
	}
	return blocks, nil
}

// open finds a backend's mapping and opens the file behind it.
func (p *process) open(b backend, all []backend, maps []sys.Mapping) (migrate.Memory, error) {
	var found []extent
	for _, e := range extents(maps) {
		if e.end-e.start != uint64(b.Size) || !b.owns(e.path) {
			continue
		}
		found = append(found, e)
	}
	same := slices.DeleteFunc(slices.Clone(all), func(o backend) bool { return o.Kind != b.Kind || o.Path != b.Path || o.Size != b.Size })
	if len(found) != 1 || len(same) != 1 {
		return migrate.Memory{}, fmt.Errorf("%d mappings are like those of its %d backends of this kind and size", len(found), len(same))
	}
	e := found[0]
	// By way of the mapping itself: the path may not be ours to open, or may be
	// another file by now, and a memfd has none.
	path := fmt.Sprintf("/proc/%d/map_files/%x-%x", p.pid, e.first.Start, e.first.End)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return migrate.Memory{}, err
	}
	m := migrate.Memory{Name: b.ID, File: f, Size: b.Size, Addr: e.start}
	return m, p.check(f, b, e)
}

// check makes sure that the file is what the mapping shows.
func (p *process) check(f *os.File, b backend, e extent) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return errors.Join(err, f.Close())
	}
	if st.Ino != e.first.Inode || st.Size != b.Size {
		return errors.Join(fmt.Errorf("its file has %d bytes, not %d, or is another", st.Size, b.Size), f.Close())
	}
	if ended, err := sys.PidfdExited(p.pidfd); ended || err != nil {
		return errors.Join(errNoProcess, err, f.Close())
	}
	return nil
}

// owns says whether a mapping's path is the backend's.
func (b backend) owns(path string) bool {
	if b.Kind == "memory-backend-memfd" {
		return strings.HasPrefix(path, "/memfd:")
	}
	return filepath.Clean(path) == filepath.Clean(b.Path)
}

// extent is a file that is mapped in one piece, though the kernel may keep that
// as several mappings.
type extent struct {
	start, end uint64
	path       string
	first      sys.Mapping
}

func extents(maps []sys.Mapping) []extent {
	var all []extent
	for _, m := range maps {
		if !m.Shared || m.Inode == 0 {
			continue
		}
		if n := len(all); n > 0 {
			last := &all[n-1]
			if last.end == m.Start && last.first.Inode == m.Inode && last.path == m.Path && m.Offset == last.end-last.start {
				last.end = m.End
				continue
			}
		}
		if m.Offset == 0 {
			all = append(all, extent{start: m.Start, end: m.End, path: m.Path, first: m})
		}
	}
	return all
}

func closeBlocks(blocks []migrate.Memory) error {
	var errs []error
	for _, b := range blocks {
		errs = append(errs, b.File.Close())
	}
	return errors.Join(errs...)
}

// drain waits until the block I/O that is in flight has landed.
func (g *domain) drain(ctx context.Context, l *link) error {
	return g.monitor(ctx, l, "transaction", object{"actions": []any{}}, nil)
}
