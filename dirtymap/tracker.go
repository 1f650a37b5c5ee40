package dirtymap

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
)

// PageSize is the unit of tracking, in bytes, also where the process maps huge
// pages: a write to one then marks all of its pages.
const PageSize = 4096

// Region is a range of a process' address space, in bytes, page aligned.
type Region struct {
	Addr uint64
	Size uint64
}

// uffdFeatures are what tracking takes: protection of shared memory, of pages
// that are not there yet, and without a handler.
const uffdFeatures = sys.UffdFeatureWPAsync | sys.UffdFeatureWPUnpopulated |
	sys.UffdFeatureWPHugetlbfsShmem | sys.UffdFeaturePagefaultFlagWP

// Tracker knows which pages of a process were written. Its methods must not be
// called concurrently.
type Tracker struct {
	proc    Process
	uffd    int
	pagemap *os.File
	areas   []*area
	// reportsHoles: see holesReported.
	reportsHoles bool
}

// Attach begins to track the regions of a process; they must be mapped and not
// overlap. Besides the kernel's, the errors are ErrTraced, ErrExited,
// ErrMismatch, ErrBusy, ErrUnsupported and ErrPermission. After an error nothing
// is left in the process. One whose seccomp filter kills for a call that it does
// not know must not be attached to: userfaultfd(2) would end it. QEMU's sandbox
// lets the call pass.
func Attach(p Process, regions []Region) (*Tracker, error) {
	if err := p.verify(); err != nil {
		return nil, fmt.Errorf("dirtymap: attach: %w", err)
	}
	t := &Tracker{proc: p, uffd: -1}
	if err := t.attach(regions); err != nil {
		return nil, errors.Join(fmt.Errorf("dirtymap: attach: %w", err), t.release())
	}
	return t, nil
}

func (t *Tracker) attach(regions []Region) error {
	pagemap, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", t.proc.PID))
	if err != nil {
		return classify(err)
	}
	t.pagemap = pagemap
	maps, err := sys.Maps(t.proc.PID)
	if err != nil {
		return classify(err)
	}
	for _, r := range regions {
		a, err := newArea(t.proc.PID, r, maps)
		if err != nil {
			return err
		}
		t.areas = append(t.areas, a)
	}
	if t.reportsHoles, err = holesReported(); err != nil {
		return err
	}
	if t.uffd, err = borrowUserfault(t.proc); err != nil {
		return err
	}
	if err := handshake(t.uffd); err != nil {
		return err
	}
	for _, a := range t.areas {
		if err := t.register(a); err != nil {
			return err
		}
	}
	return nil
}

// register puts a region under protection.
func (t *Tracker) register(a *area) error {
	if _, err := sys.UffdRegisterWP(t.uffd, a.addr, a.size); err != nil {
		return classify(err)
	}
	s := t.scanOf(true)
	for _, c := range a.chunks {
		if err := c.scanFresh(&s, nil); err != nil {
			return classify(err)
		}
	}
	return nil
}

func (t *Tracker) scanOf(protect bool) scanOf {
	return scanOf{
		pagemap: int(t.pagemap.Fd()), uffd: t.uffd,
		probeTables: !t.reportsHoles, protect: protect,
	}
}

// Collect adds to each region's bitmap, which has one page for each of the
// region's, the pages written since the last Collect, or since Attach, and
// starts anew. It may name pages that were only read or given back, but never
// leaves one out that was written.
//
// A page that the process punches out of the file counts as written only if it
// was before; what it reads as, zero, has to be found by looking for holes.
//
// After an error it is not known what was written, and the Tracker is good only
// for Close.
func (t *Tracker) Collect(into []*Bitmap) error { return t.scan("collect", true, into) }

// Peek adds the pages written since the last Collect, without starting anew.
func (t *Tracker) Peek(into []*Bitmap) error { return t.scan("peek", false, into) }

func (t *Tracker) scan(op string, protect bool, into []*Bitmap) error {
	if t.pagemap == nil {
		return fmt.Errorf("dirtymap: %s: %w", op, ErrClosed)
	}
	if len(into) != len(t.areas) {
		return fmt.Errorf("dirtymap: %s: %d bitmaps for %d regions", op, len(into), len(t.areas))
	}
	for i, a := range t.areas {
		if into[i].Len() != a.pages() {
			return fmt.Errorf("dirtymap: %s: bitmap %d has %d pages, its region %d", op, i, into[i].Len(), a.pages())
		}
	}
	s := t.scanOf(protect)
	var g errgroup.Group
	for i, a := range t.areas {
		for _, c := range a.chunks {
			g.Go(func() error { return c.scan(&s, into[i]) })
		}
	}
	err := g.Wait()
	if err == nil {
		err = t.alive()
	}
	if errors.Is(err, unix.ESRCH) {
		err = fmt.Errorf("%w: %w", ErrExited, err)
	}
	if err != nil {
		return fmt.Errorf("dirtymap: %s: process %d: %w", op, t.proc.PID, err)
	}
	return nil
}

// alive makes sure that the address space that was scanned is still the
// process': that of one that has exited or executed another program has no
// pages, and so none that were written.
func (t *Tracker) alive() error {
	if len(t.areas) == 0 {
		return t.proc.verify()
	}
	var entry [8]byte
	n, err := t.pagemap.ReadAt(entry[:], int64(t.areas[0].addr/PageSize*8))
	if n == 0 {
		return fmt.Errorf("%w: %w", ErrExited, err)
	}
	return nil
}

// Close ends tracking. Nothing of it is left in the process.
func (t *Tracker) Close() error {
	if t.pagemap == nil {
		return nil
	}
	if err := t.release(); err != nil {
		return fmt.Errorf("dirtymap: close: %w", err)
	}
	return nil
}

func (t *Tracker) release() error {
	var errs []error
	if t.uffd >= 0 {
		// The last descriptor: the kernel lifts all protection before this
		// returns.
		errs = append(errs, unix.Close(t.uffd))
		t.uffd = -1
	}
	for _, a := range t.areas {
		errs = append(errs, a.close())
	}
	if t.pagemap != nil {
		errs = append(errs, t.pagemap.Close())
		t.pagemap = nil
	}
	return errors.Join(errs...)
}
