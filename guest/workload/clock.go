package workload

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/control"
)

// Clock reads the clock at every tick and keeps the largest gap between two
// readings. It also counts its ticks in a word of memory that the host can
// watch from outside.
type Clock struct {
	mu    sync.Mutex
	tick  time.Duration
	ticks uint64
	gap   time.Duration
	last  time.Time
	word  []byte // one page, locked in memory; the count is its first 32 bits
}

// NewClock returns a clock that Run starts.
func NewClock(tick time.Duration) (*Clock, error) {
	word, err := unix.Mmap(-1, 0, PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS|unix.MAP_LOCKED)
	if err != nil {
		return nil, fmt.Errorf("clock: a page for the count: %w", err)
	}
	c := &Clock{word: word}
	return c, c.SetTick(tick)
}

// SetTick changes the time between two readings.
func (c *Clock) SetTick(tick time.Duration) error {
	if tick < control.MinTick || tick > control.MaxTick {
		return fmt.Errorf("clock: tick of %v: it may be %v to %v", tick, control.MinTick, control.MaxTick)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tick, c.last = tick, time.Time{}
	return nil
}

// Reset forgets the largest gap.
func (c *Clock) Reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gap = 0
}

// Status is the account so far.
func (c *Clock) Status() control.ClockStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	gpa, err := physical(c.word)
	if err != nil {
		gpa = 0 // not known is what 0 means
	}
	return control.ClockStatus{Tick: c.tick, Ticks: c.ticks, LargestGap: c.gap, TickGPA: gpa}
}

// Run ticks until ctx ends. It keeps a thread of its own, since Go's timers are
// only good to a millisecond.
func (c *Clock) Run(ctx context.Context) {
	runtime.LockOSThread()
	// Coarser without. It gets no priority over the other threads: Go's runtime
	// spins (in casgstatus) until a collection has scanned this goroutine's
	// stack, and on a guest's only CPU the collector would not come to run.
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	for ctx.Err() == nil {
		ts := unix.NsecToTimespec(int64(c.step(time.Now())))
		_ = unix.Nanosleep(&ts, nil) // an early wake-up is one more reading
	}
}

// step takes one reading and returns the time until the next.
func (c *Clock) step(now time.Time) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ticks++
	binary.LittleEndian.PutUint32(c.word, uint32(c.ticks))
	if !c.last.IsZero() {
		c.gap = max(c.gap, now.Sub(c.last))
	}
	c.last = now
	return c.tick
}

// physical returns the physical address of the page that b begins in. It needs
// root.
func physical(b []byte) (uint64, error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var entry [8]byte
	if _, err := f.ReadAt(entry[:], int64(address(b)/PageSize*8)); err != nil {
		return 0, err
	}
	// Documentation/admin-guide/mm/pagemap.rst: bit 63 says present, bits 0 to
	// 54 are the page frame number.
	e := binary.LittleEndian.Uint64(entry[:])
	if e>>63 == 0 {
		return 0, fmt.Errorf("page not present")
	}
	return e & (1<<55 - 1) * PageSize, nil
}
