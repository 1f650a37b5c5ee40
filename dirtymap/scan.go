package dirtymap

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
)

const (
	// vecLen is how many runs one scan may report.
	vecLen = 4096
	// maxGap is how many clean pages between two written ones are protected
	// once more with them. Each protecting scan makes KVM flush its TLBs; each
	// page that KVM has mapped and loses costs the guest a fault.
	maxGap = 16
	// maxProtect bounds a protecting call, in bytes: until it returns, KVM maps
	// nothing in its range, and vCPUs that touch it wait.
	maxProtect = 16 * blockSize
)

// chunk is a part of an area that one goroutine scans.
//
// There are two kinds of blocks in it. Where the region held data when the
// block was first looked at, it has a page table in which every entry is filled:
// with a page, or with a marker that has its protection. That block is mapped,
// and the kernel tells what was written. Where there was no data nothing was
// written, and as long as there is none, nothing has been: such a block costs
// neither memory nor, many together, time.
type chunk struct {
	area       *area
	start, end uint64  // byte addresses
	mapped     *Bitmap // of the blocks, counted from the one that start is in
	found      *Bitmap // the mapped blocks in which the present scan found a page
	runs       []sys.PageRegion
	wrote      []sys.PageRegion
	probe      []sys.PageRegion
}

func newChunk(a *area, start, end uint64) *chunk {
	blocks := int((end-1)/blockSize-start/blockSize) + 1
	return &chunk{
		area: a, start: start, end: end,
		mapped: New(blocks), found: New(blocks),
		runs:  make([]sys.PageRegion, vecLen),
		wrote: make([]sys.PageRegion, vecLen),
		probe: make([]sys.PageRegion, 1),
	}
}

// blocks returns the blocks, first and one past the last, that the addresses lo
// to hi-1 are in.
func (c *chunk) blocks(lo, hi uint64) (first, end int) {
	base := c.start / blockSize
	return int(lo/blockSize - base), int((hi-1)/blockSize-base) + 1
}

// addrs returns the addresses of the blocks first to end-1 within the chunk.
func (c *chunk) addrs(first, end int) (lo, hi uint64) {
	base := c.start / blockSize
	return max((base+uint64(first))*blockSize, c.start), min((base+uint64(end))*blockSize, c.end)
}

// mark adds the pages at the addresses lo to hi-1.
func (c *chunk) mark(b *Bitmap, lo, hi uint64) {
	b.SetRange(int((lo-c.area.addr)/PageSize), int((hi-c.area.addr)/PageSize))
}

// scanOf is what the chunks of one scan share.
type scanOf struct {
	pagemap int
	uffd    int
	// probeTables: this kernel does not report that a page table is gone.
	probeTables bool
	protect     bool // collect, rather than peek
}

// scan adds what was written to b. If it is to protect it looks first and
// protects only what it found, so that KVM keeps the rest mapped.
func (c *chunk) scan(s *scanOf, b *Bitmap) error {
	c.found.Reset()
	for first, n := range c.mapped.Runs() {
		lo, hi := c.addrs(first, first+n)
		if err := c.scanMapped(s, lo, hi, b); err != nil {
			return err
		}
	}
	if s.probeTables || c.area.grain > PageSize {
		if err := c.vanished(s, b); err != nil {
			return err
		}
	}
	return c.scanFresh(s, b)
}

func (c *chunk) scanMapped(s *scanOf, lo, hi uint64, b *Bitmap) error {
	for lo < hi {
		runs, next, err := pagemapScan(s.pagemap, writtenPages(lo, hi, 0), c.runs)
		if err != nil {
			return err
		}
		for _, r := range runs {
			c.mark(b, r.Start, r.End)
			c.found.SetRange(c.blocks(r.Start, r.End))
		}
		if s.protect {
			if err := c.protectRuns(s, runs, b); err != nil {
				return err
			}
		}
		lo = next
	}
	return nil
}

// writtenPages asks for written pages. With just these masks the kernel looks at
// nothing but the protection, so that an empty entry of a page table counts as
// written. It has to: a page that was written and then reclaimed leaves one.
// Protecting puts a marker there.
func writtenPages(lo, hi, flags uint64) sys.Scan {
	return sys.Scan{
		Flags: flags | sys.ScanCheckWPAsync,
		Start: lo,
		End:   hi,
		Mask:  sys.PageIsWritten, Return: sys.PageIsWritten,
	}
}

// protectRuns protects runs, together with the small gaps between them, and adds
// what else was written there since they were found.
func (c *chunk) protectRuns(s *scanOf, runs []sys.PageRegion, b *Bitmap) error {
	for len(runs) > 0 {
		n := 1
		for n < len(runs) && runs[n].Start-runs[n-1].End <= maxGap*PageSize {
			n++
		}
		for at, end := runs[0].Start, runs[n-1].End; at < end; {
			piece := writtenPages(at, min(end, at/blockSize*blockSize+maxProtect), sys.ScanWPMatching)
			if c.area.grain > blockSize {
				piece.End = end
			}
			wrote, next, err := pagemapScan(s.pagemap, piece, c.wrote)
			if err != nil {
				return err
			}
			for _, r := range wrote {
				c.mark(b, r.Start, r.End)
			}
			at = next
		}
		runs = runs[n:]
	}
	return nil
}

// vanished marks all pages of the mapped blocks whose page tables are gone, and
// with them what they knew: the kernel drops one when madvise has emptied it.
// A block in which nothing was found has a table without an empty entry or no
// table at all, so that one page tells.
func (c *chunk) vanished(s *scanOf, b *Bitmap) error {
	for first, n := range c.mapped.Runs() {
		for block := first; block < first+n; block++ {
			if c.found.Test(block) {
				continue
			}
			lo, hi := c.addrs(block, block+1)
			there, _, err := pagemapScan(s.pagemap, anyPage(lo), c.probe)
			if err != nil {
				return err
			}
			if len(there) > 0 {
				continue
			}
			c.mark(b, lo, hi)
			if s.protect {
				c.mapped.Clear(block)
			}
		}
	}
	return nil
}

// anyPage asks whether the entry of one page is not empty.
func anyPage(addr uint64) sys.Scan {
	const any = sys.PageIsPresent | sys.PageIsSwapped
	return sys.Scan{Flags: sys.ScanCheckWPAsync, Start: addr, End: addr + PageSize, AnyOf: any, Return: any}
}

// scanFresh adds what the blocks that are not mapped hold by now. Their page
// tables are not asked: whatever those say, without data nothing was written.
// If it is to protect, the blocks that hold data become mapped.
func (c *chunk) scanFresh(s *scanOf, b *Bitmap) error {
	for at := 0; ; {
		first := c.mapped.next(at, ^uint64(0))
		if first == c.mapped.Len() {
			return nil
		}
		at = c.mapped.next(first, 0)
		lo, hi := c.addrs(first, at)
		for r, err := range c.area.data(lo, hi) {
			if err != nil {
				return err
			}
			if !s.protect {
				c.mark(b, r.Addr, r.Addr+r.Size)
				continue
			}
			if err := c.protectBlocks(s, r, b); err != nil {
				return err
			}
		}
	}
}

// protectBlocks protects the blocks of a range that are not mapped yet, and then
// adds, unless b is nil, the data they hold: everything written before. Later
// writes lift the protection.
func (c *chunk) protectBlocks(s *scanOf, r Region, b *Bitmap) error {
	first, end := c.blocks(r.Addr, r.Addr+r.Size)
	first = c.mapped.next(first, ^uint64(0)) // the first may have been in the range before
	if first >= end {
		return nil
	}
	lo, hi := c.addrs(first, end)
	for at := lo; at < hi; at += maxProtect {
		if err := sys.UffdWriteprotect(s.uffd, at, min(maxProtect, hi-at), true); err != nil {
			return err
		}
	}
	c.mapped.SetRange(first, end)
	if b == nil {
		return nil
	}
	for d, err := range c.area.data(lo, hi) {
		if err != nil {
			return err
		}
		c.mark(b, d.Addr, d.Addr+d.Size)
	}
	return nil
}

// pagemapScan is sys.PagemapScan that makes headway or fails.
func pagemapScan(fd int, s sys.Scan, vec []sys.PageRegion) (runs []sys.PageRegion, next uint64, err error) {
	n, next, err := sys.PagemapScan(fd, s, vec)
	switch {
	case errors.Is(err, unix.EPERM):
		return nil, 0, fmt.Errorf("memory was mapped anew and is not tracked: %w", err)
	case err != nil:
		return nil, 0, err
	case next <= s.Start:
		return nil, 0, fmt.Errorf("PAGEMAP_SCAN %#x-%#x stopped at %#x", s.Start, s.End, next)
	}
	return vec[:n], next, nil
}
