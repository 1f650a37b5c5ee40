package dirtymap

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
)

// probed is the answer of Probe once it is conclusive.
var probed struct {
	sync.Mutex
	known bool
	err   error
}

// Probe says, by tracking two pages of this process' own memory, whether this
// kernel can track. An error matches ErrUnsupported when something is missing,
// and ErrPermission when this process may not use what is there. Whether a
// given hypervisor may be traced only Attach can tell.
func Probe() error {
	probed.Lock()
	defer probed.Unlock()
	if probed.known {
		return probed.err
	}
	err := probe()
	if err != nil {
		err = fmt.Errorf("dirtymap: probe: %w", err)
	}
	// A missing permission may be granted, and memory be short for a moment.
	if err == nil || errors.Is(err, ErrUnsupported) {
		probed.known, probed.err = true, err
	}
	return err
}

// ownMemory is memory of this process that is tracked by itself.
type ownMemory struct {
	mem     []byte
	addr    uint64
	uffd    int
	pagemap *os.File
}

// trackOwn registers fresh shared memory of this process.
func trackOwn(size int) (m *ownMemory, err error) {
	m = &ownMemory{uffd: -1}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.close())
		}
	}()
	if m.mem, err = sharedMemory(size); err != nil {
		return nil, err
	}
	m.addr = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(m.mem))))
	if m.pagemap, err = os.Open("/proc/self/pagemap"); err != nil {
		return nil, classify(err)
	}
	if m.uffd, err = sys.Userfaultfd(uffdFlags); err != nil {
		return nil, classify(err)
	}
	if err := handshake(m.uffd); err != nil {
		return nil, err
	}
	if _, err := sys.UffdRegisterWP(m.uffd, m.addr, uint64(size)); err != nil {
		return nil, classify(err)
	}
	return m, nil
}

func (m *ownMemory) close() error {
	var errs []error
	if m.uffd >= 0 {
		errs = append(errs, unix.Close(m.uffd))
	}
	if m.pagemap != nil {
		errs = append(errs, m.pagemap.Close())
	}
	if m.mem != nil {
		errs = append(errs, unix.Munmap(m.mem))
	}
	return errors.Join(errs...)
}

// scan scans all of the memory for written pages.
func (m *ownMemory) scan(flags uint64) ([]sys.PageRegion, error) {
	runs, _, err := pagemapScan(int(m.pagemap.Fd()), writtenPages(m.addr, m.addr+uint64(len(m.mem)), flags), make([]sys.PageRegion, 4))
	return runs, classify(err)
}

func probe() (err error) {
	const size = 2 * PageSize
	m, err := trackOwn(size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	m.mem[0] = 1
	if err := sys.UffdWriteprotect(m.uffd, m.addr, size, true); err != nil {
		return classify(err)
	}
	m.mem[PageSize] = 1
	runs, err := m.scan(sys.ScanWPMatching)
	if err != nil {
		return err
	}
	if len(runs) != 1 || runs[0].Start != m.addr+PageSize || runs[0].End != m.addr+size {
		return fmt.Errorf("%w: PAGEMAP_SCAN reported %d runs for one written page", ErrUnsupported, len(runs))
	}
	return nil
}

// holes is the answer of holesReported once it is known.
var holes struct {
	sync.Mutex
	known, reported bool
}

// holesReported says whether this kernel reports a range without a page table as
// written. Linux did not before 2026; there, that a table has gone has to be
// found out otherwise.
func holesReported() (reported bool, err error) {
	holes.Lock()
	defer holes.Unlock()
	if holes.known {
		return holes.reported, nil
	}
	m, err := trackOwn(3 * blockSize)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	runs, err := m.scan(0)
	if err != nil {
		return false, err
	}
	// The blocks at the edges may share their tables with other mappings, but
	// one is whole and was never touched.
	whole := (m.addr + blockSize - 1) / blockSize * blockSize
	for _, r := range runs {
		if r.Start <= whole && r.End >= whole+blockSize {
			holes.reported = true
		}
	}
	holes.known = true
	return holes.reported, nil
}

// handshake asks a new userfaultfd for what tracking takes.
func handshake(uffd int) error {
	_, err := sys.UffdAPI(uffd, uffdFeatures)
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: %w: Linux 6.7 or later, with CONFIG_PTE_MARKER_UFFD_WP, is needed", ErrUnsupported, err)
	}
	return classify(err)
}

func sharedMemory(size int) ([]byte, error) {
	fd, err := unix.MemfdCreate("dirtymap-probe", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", classify(err))
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, fmt.Errorf("size of memfd: %w", err)
	}
	b, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map memfd: %w", err)
	}
	return b, nil
}
