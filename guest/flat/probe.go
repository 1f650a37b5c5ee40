package flat

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultInterval is how often a Probe looks.
const DefaultInterval = 100 * time.Microsecond

// Probe watches one counter that exists in several copies, one in each memory
// file that the guest has, and finds the longest time in which none of them
// went beyond what any had reached before: a migration that copies the counter
// is not the guest going on. The host's monotonic clock measures it, since a guest's own clocks
// stand still while the guest does. The error is at most the interval between
// two looks plus what the host's scheduler adds, and only ever lengthens a gap.
type Probe struct {
	interval time.Duration
	mu       sync.Mutex // guards words and what follows
	words    []*word
	highest  uint32    // the furthest that any copy has come
	last     time.Time // when some copy was last seen to go on
	gap      Gap
	over     Gap   // the longest that ended with another copy than it began with
	mover    *word // the copy that was last seen to go on
	moved    bool  // some copy has gone on since the probe began or was reset
	late     time.Duration
	looks    uint64

	stop chan struct{}
	done chan struct{}
}

// Gap is a time in which no copy of the counter went on.
type Gap struct {
	Start  time.Time
	Length time.Duration
}

type word struct {
	mapped []byte // the page that holds the counter
	at     int
}

// load is one aligned load, so it cannot tear.
func (w *word) load() uint32 { return binary.LittleEndian.Uint32(w.mapped[w.at:]) }

// NewProbe starts a probe that looks every interval. Close ends it.
func NewProbe(interval time.Duration) *Probe {
	p := &Probe{interval: interval, stop: make(chan struct{}), done: make(chan struct{})}
	go p.run()
	return p
}

// Add watches the 32-bit word at off in a memory file too. The probe keeps the
// file mapped, so that it may be removed while it is watched.
func (p *Probe) Add(path string, off int64) error {
	if off < 0 || off%4 != 0 {
		return fmt.Errorf("probe %s: a counter at %#x is not aligned", path, off)
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	if st.Size() < off+4 {
		return fmt.Errorf("probe %s: %d bytes, but the counter is at %#x", path, st.Size(), off)
	}
	page := int64(os.Getpagesize())
	base := off / page * page
	m, err := unix.Mmap(int(f.Fd()), base, int(page), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("probe: map %s: %w", path, err)
	}
	w := &word{mapped: m, at: int(off - base)}
	p.mu.Lock()
	defer p.mu.Unlock()
	if v := w.load(); len(p.words) == 0 || ahead(v, p.highest) {
		p.highest = v
	}
	p.words = append(p.words, w)
	return nil
}

// Reset forgets the longest gap.
func (p *Probe) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gap, p.over, p.mover, p.moved, p.late, p.looks = Gap{}, Gap{}, nil, false, 0, 0
}

// Longest returns the longest gap since the probe began or was reset. A gap
// that has not ended counts as far as it goes.
func (p *Probe) Longest() Gap {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.moved {
		if open := time.Since(p.last); open > p.gap.Length {
			return Gap{Start: p.last, Length: open}
		}
	}
	return p.gap
}

// Switchover returns the longest gap after which another copy went on than
// before it, since the probe began or was reset: that of a migration itself,
// whatever else has kept the guest waiting.
func (p *Probe) Switchover() Gap {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.over
}

// Lateness returns the longest time between two looks: how far the host itself
// may have lengthened a gap.
func (p *Probe) Lateness() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.late
}

// Moving says whether a copy has gone on since the probe began or was reset.
func (p *Probe) Moving() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.moved
}

// Close ends the probe and unmaps the files.
func (p *Probe) Close() error {
	close(p.stop)
	<-p.done
	var first error
	for _, w := range p.words {
		if err := unix.Munmap(w.mapped); err != nil && first == nil {
			first = fmt.Errorf("probe: unmap: %w", err)
		}
	}
	p.words = nil
	return first
}

func (p *Probe) run() {
	defer close(p.done)
	// Go's own timers are good to a millisecond only, and a thread's to 50 µs
	// unless it says otherwise. The thread keeps its slack, so it is not given
	// back.
	runtime.LockOSThread()
	// Without the right to either it looks less often, which is coarser but no
	// less true.
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	// Not a real-time policy: Go's runtime spins on its locks, whose holders must
	// run.
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, -20) // 0 is this thread
	last := time.Now()
	for {
		select {
		case <-p.stop:
			return
		default:
		}
		ts := unix.NsecToTimespec(int64(p.interval))
		_ = unix.Nanosleep(&ts, nil) // an early wake-up is one more look
		now := time.Now()
		p.look(now, now.Sub(last))
		last = now
	}
}

func (p *Probe) look(now time.Time, since time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.looks++
	if p.looks > 1 {
		p.late = max(p.late, since)
	}
	var mover *word
	for _, w := range p.words {
		if v := w.load(); ahead(v, p.highest) {
			p.highest, mover = v, w
		}
	}
	if mover == nil {
		return
	}
	if p.moved {
		gap := Gap{Start: p.last, Length: now.Sub(p.last)}
		if gap.Length > p.gap.Length {
			p.gap = gap
		}
		// A copy may be read just after its page has been brought up to date, and
		// go on for one look: that gap is short.
		if mover != p.mover && gap.Length > p.over.Length {
			p.over = gap
		}
	}
	p.last, p.mover, p.moved = now, mover, true
}

// ahead compares counters that wrap round.
func ahead(a, b uint32) bool { return int32(a-b) > 0 }
