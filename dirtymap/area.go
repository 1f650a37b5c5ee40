package dirtymap

import (
	"errors"
	"fmt"
	"iter"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
)

const (
	// blockSize is what one page table maps.
	blockSize = 2 << 20
	// chunkSize is the least that is worth a goroutine of its own.
	chunkSize = 512 << 20
)

// area is a tracked region.
type area struct {
	addr, size uint64
	grain      uint64 // size of the pages that the region is mapped with
	segments   []segment
	chunks     []*chunk
}

// segment is a part of a region in one mapping.
type segment struct {
	start, end uint64
	file       *os.File // what is mapped; nil when its holes cannot be known
	off        int64    // of start in the file
}

func newArea(pid int, r Region, maps []sys.Mapping) (*area, error) {
	end := r.Addr + r.Size
	if r.Size == 0 || r.Addr%PageSize != 0 || r.Size%PageSize != 0 || end < r.Addr {
		return nil, fmt.Errorf("region %#x+%#x is not made of pages", r.Addr, r.Size)
	}
	a := &area{addr: r.Addr, size: r.Size, grain: PageSize}
	if err := a.survey(pid, maps); err != nil {
		return nil, errors.Join(fmt.Errorf("region %#x+%#x: %w", r.Addr, r.Size, err), a.close())
	}
	a.split()
	return a, nil
}

// survey finds out what is mapped in the region.
func (a *area) survey(pid int, maps []sys.Mapping) error {
	at, end := a.addr, a.addr+a.size
	for _, m := range maps {
		if m.End <= at {
			continue
		}
		if m.Start > at || at == end {
			break
		}
		s := segment{start: at, end: min(m.End, end), off: int64(at - m.Start + m.Offset)}
		if err := a.open(pid, m, &s); err != nil {
			return err
		}
		a.segments = append(a.segments, s)
		at = s.end
	}
	if at != end {
		return fmt.Errorf("nothing is mapped at %#x", at)
	}
	if a.addr%a.grain != 0 || a.size%a.grain != 0 {
		return fmt.Errorf("it cuts a page of %#x bytes", a.grain)
	}
	return nil
}

// open opens the file that is mapped in a segment.
func (a *area) open(pid int, m sys.Mapping, s *segment) error {
	if m.Inode == 0 {
		return nil
	}
	// The link leads to the file itself, even one without a name.
	f, err := os.Open(fmt.Sprintf("/proc/%d/map_files/%x-%x", pid, m.Start, m.End))
	if err != nil {
		return fmt.Errorf("file %q: %w", m.Path, classify(err))
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return errors.Join(fmt.Errorf("file system of %q: %w", m.Path, err), f.Close())
	}
	if fs.Type == unix.HUGETLBFS_MAGIC {
		a.grain = max(a.grain, uint64(fs.Bsize))
		return f.Close()
	}
	s.file = f
	return nil
}

func (a *area) close() error {
	var errs []error
	for _, s := range a.segments {
		if s.file != nil {
			errs = append(errs, s.file.Close())
		}
	}
	a.segments = nil
	return errors.Join(errs...)
}

func (a *area) pages() int { return int(a.size / PageSize) }

// data yields the ranges between lo and hi that hold data, in whole pages and
// ascending order. What cannot have holes, or does not tell, is all data.
func (a *area) data(lo, hi uint64) iter.Seq2[Region, error] {
	return func(yield func(Region, error) bool) {
		for i := range a.segments {
			s := &a.segments[i]
			from, to := max(lo, s.start), min(hi, s.end)
			if from < to && !s.data(from, to, yield) {
				return
			}
		}
	}
}

// data is area.data for a range within a segment. It returns false when there is
// to be no more.
func (s *segment) data(lo, hi uint64, yield func(Region, error) bool) bool {
	if s.file == nil {
		return yield(Region{Addr: lo, Size: hi - lo}, nil)
	}
	base := s.off - int64(s.start)
	for e, err := range sys.DataRuns(s.file, int64(lo)+base, int64(hi)+base) {
		if err != nil {
			yield(Region{}, fmt.Errorf("holes of mapped file: %w", err))
			return false
		}
		from := uint64(e.Off-base) / PageSize * PageSize
		to := (uint64(e.Off-base+e.Len) + PageSize - 1) / PageSize * PageSize
		if !yield(Region{Addr: from, Size: to - from}, nil) {
			return false
		}
	}
	return true
}

// split divides the area into chunks that can be scanned in parallel. They share
// no word of a bitmap and no huge page.
func (a *area) split() {
	end := a.addr + a.size
	n := max(1, min(uint64(runtime.GOMAXPROCS(0)), a.size/chunkSize))
	unit := max(a.grain, wordBits*PageSize)
	step := (a.size/n + unit - 1) / unit * unit
	for at := a.addr; at < end; at += step {
		a.chunks = append(a.chunks, newChunk(a, at, min(at+step, end)))
	}
}
