package migrate

import (
	"fmt"
	"runtime/debug"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/internal/sys"
)

// block is a memory block mapped into this process.
type block struct {
	Memory
	data  []byte
	pages int
}

// blocks are a guest's memory, mapped. They belong to whoever mapped them.
type blocks []block

// mapMemory maps each block shared, to read guest memory at the source
// (writable false) or to write it at the destination.
func mapMemory(mem []Memory, writable bool) (blocks, error) {
	prot := unix.PROT_READ
	if writable {
		prot |= unix.PROT_WRITE
	}
	bs := make(blocks, 0, len(mem))
	for _, m := range mem {
		if m.Size <= 0 || m.Size%PageSize != 0 {
			bs.unmap()
			return nil, fmt.Errorf("memory block %q: size of %d bytes is not a multiple of %d", m.Name, m.Size, PageSize)
		}
		data, err := unix.Mmap(int(m.File.Fd()), 0, int(m.Size), prot, unix.MAP_SHARED)
		if err != nil {
			bs.unmap()
			return nil, fmt.Errorf("map memory block %q: %w", m.Name, err)
		}
		bs = append(bs, block{Memory: m, data: data, pages: int(m.Size / PageSize)})
	}
	return bs, nil
}

// clear makes holes of the blocks of a shell that has not run. Holes of the guest
// are not sent, so that whatever were there would become its memory: a
// hypervisor may have been given a file that an earlier guest has left.
func (bs blocks) clear() error {
	for _, b := range bs {
		if err := unix.Fallocate(int(b.File.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, b.Size); err != nil {
			return fmt.Errorf("clear memory block %q: %w", b.Name, err)
		}
	}
	return nil
}

func (bs blocks) unmap() {
	for _, b := range bs {
		// munmap of a whole mapping that we made cannot fail.
		_ = unix.Munmap(b.data)
	}
}

func (bs blocks) pages() (n int64) {
	for _, b := range bs {
		n += int64(b.pages)
	}
	return n
}

func (bs blocks) infos() []BlockInfo {
	out := make([]BlockInfo, len(bs))
	for i, b := range bs {
		out[i] = BlockInfo{Name: b.Name, Size: b.Size}
	}
	return out
}

func (bs blocks) regions() []dirtymap.Region {
	out := make([]dirtymap.Region, len(bs))
	for i, b := range bs {
		out[i] = dirtymap.Region{Addr: b.Addr, Size: uint64(b.Size)}
	}
	return out
}

func (bs blocks) bitmaps() []*dirtymap.Bitmap {
	out := make([]*dirtymap.Bitmap, len(bs))
	for i, b := range bs {
		out[i] = dirtymap.New(b.pages)
	}
	return out
}

// present adds the pages that are not holes of the memory files to maps.
func (bs blocks) present(maps []*dirtymap.Bitmap) error {
	for i, b := range bs {
		for run, err := range sys.DataRuns(b.File, 0, b.Size) {
			if err != nil {
				return fmt.Errorf("find the holes of memory block %q: %w", b.Name, err)
			}
			maps[i].SetRange(pageRange(run))
		}
	}
	return nil
}

// pageRange returns the pages that hold part of an extent.
func pageRange(e sys.Extent) (lo, hi int) {
	return int(e.Off / PageSize), int((e.Off + e.Len + PageSize - 1) / PageSize)
}

// run returns a run of pages of guest memory.
func (b block) run(first, n int) []byte {
	return b.data[first*PageSize : (first+n)*PageSize]
}

// guarded runs fn, which touches mapped guest memory, and turns the fault of
// an access that the kernel cannot satisfy into an error: a memory file that
// was truncated behind our back, or a memory file system that is full.
func guarded(what string, fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			fault, ok := r.(interface{ Addr() uintptr })
			if !ok {
				panic(r)
			}
			err = fmt.Errorf("%s: guest memory cannot be accessed at %#x (memory file truncated, or its file system full)", what, fault.Addr())
		}
	}()
	return fn()
}

var zeroes [PageSize]byte

// isZero says whether a page holds only zeroes.
func isZero(page []byte) bool {
	return *(*[PageSize]byte)(page) == zeroes
}
