package workload

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/control"
)

// Memory writes memory at a set rate, and checks for ever that all of it is as
// it was written. Its methods may be called at any time by anyone.
type Memory struct {
	seed     uint64
	problems *Problems
	work     []byte // the working set lies at its start
	static   []byte
	gens     []uint64 // how many times each page of work was written
	locks    [64]sync.Mutex

	mu      sync.Mutex
	setting control.MemorySetting
	changed chan struct{} // closed when the setting changes

	written, checked, sweeps, mismatches atomic.Uint64
}

// NewMemory takes capacity bytes for the working set, of which it writes as much
// as the setting says, and static bytes that it writes now and never again.
func NewMemory(setting control.MemorySetting, capacity, static int64, seed uint64, problems *Problems) (*Memory, error) {
	m := &Memory{seed: seed, problems: problems, changed: make(chan struct{})}
	var err error
	if m.work, err = anonymous(capacity); err != nil {
		return nil, fmt.Errorf("memory: working set of up to %d bytes: %w", capacity, err)
	}
	if m.static, err = anonymous(static); err != nil {
		m.Close()
		return nil, fmt.Errorf("memory: static set of %d bytes: %w", static, err)
	}
	m.gens = make([]uint64, len(m.work)/PageSize)
	for n := range len(m.static) / PageSize {
		fillStatic(m.static[n*PageSize:], seed, uint64(n))
	}
	if err := m.Set(setting); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// anonymous maps memory that costs nothing until it is touched.
func anonymous(size int64) ([]byte, error) {
	if size = size / PageSize * PageSize; size <= 0 {
		return nil, nil
	}
	return unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
}

// Close gives the memory back. Nothing may use m after it.
func (m *Memory) Close() {
	for _, b := range []*[]byte{&m.work, &m.static} {
		if *b != nil {
			_ = unix.Munmap(*b) // of a mapping that is ours: cannot fail
			*b = nil
		}
	}
}

// Set changes what the writer does. A working set that grows is written once in
// its new part before Set returns.
func (m *Memory) Set(s control.MemorySetting) error {
	if err := s.Validate(); err != nil {
		return err
	}
	if s.WorkingSet > int64(len(m.work)) {
		return fmt.Errorf("memory: working set of %d bytes: this guest has room for %d", s.WorkingSet, len(m.work))
	}
	for n := range int(s.WorkingSet / PageSize) {
		mu := m.lock(n)
		if m.gens[n] == 0 {
			m.write(n, 1)
		}
		mu.Unlock()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.setting = s
	close(m.changed)
	m.changed = make(chan struct{})
	return nil
}

// Status is the account so far.
func (m *Memory) Status() control.MemoryStatus {
	s, _ := m.current()
	return control.MemoryStatus{
		Setting: s, Static: int64(len(m.static)), Written: m.written.Load(),
		Checked: m.checked.Load(), Sweeps: m.sweeps.Load(), Mismatches: m.mismatches.Load(),
	}
}

func (m *Memory) current() (control.MemorySetting, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.setting, m.changed
}

// lock keeps others from page n.
func (m *Memory) lock(n int) *sync.Mutex {
	mu := &m.locks[n%len(m.locks)]
	mu.Lock()
	return mu
}

func (m *Memory) page(n int) []byte { return m.work[n*PageSize:][:PageSize] }

// write makes page n, which is locked, generation gen.
func (m *Memory) write(n int, gen uint64) {
	fillPage(m.page(n), m.seed, uint64(n), gen)
	m.gens[n] = gen
	m.written.Add(1)
}

// paceTick is how often a writer with a rate wakes, checkTick the checker.
const (
	paceTick  = 10 * time.Millisecond
	checkTick = 250 * time.Millisecond
)

// Write is the writer. It returns when ctx ends.
func (m *Memory) Write(ctx context.Context) {
	next, random := 0, mix(m.seed)|1
	step := func(s control.MemorySetting) {
		pages := int(s.WorkingSet / PageSize)
		n := next % pages
		next = n + 1
		if s.Pattern == control.Random {
			random = xorshift(random)
			n = int(random % uint64(pages))
		}
		mu := m.lock(n)
		defer mu.Unlock()
		gen := m.gens[n]
		if s.Pattern != control.Rewrite {
			gen++
		}
		m.write(n, gen)
	}
	pace(ctx, paceTick, PageSize, func() (int64, <-chan struct{}) {
		s, changed := m.current()
		return s.Rate, changed
	}, func() {
		s, _ := m.current()
		if s.WorkingSet >= PageSize {
			step(s)
		}
	})
}

// Check is the checker in the background. It returns when ctx ends.
func (m *Memory) Check(ctx context.Context) {
	next := 0
	pace(ctx, checkTick, PageSize, func() (int64, <-chan struct{}) {
		s, changed := m.current()
		return s.CheckRate, changed
	}, func() {
		if total := m.pages(); total > 0 {
			m.checkOne(next % total)
			if next = (next + 1) % total; next == 0 {
				m.sweeps.Add(1)
			}
		}
	})
}

// CheckAll checks every page now and returns the number of those that are wrong.
func (m *Memory) CheckAll(ctx context.Context) (wrong int, err error) {
	for i := range m.pages() {
		if err := ctx.Err(); err != nil {
			return wrong, fmt.Errorf("memory: check: %w", err)
		}
		if !m.checkOne(i) {
			wrong++
		}
	}
	m.sweeps.Add(1)
	return wrong, nil
}

// pages is how many there are to check: the static set, then the working set.
func (m *Memory) pages() int {
	s, _ := m.current()
	return len(m.static)/PageSize + int(s.WorkingSet/PageSize)
}

func (m *Memory) checkOne(i int) bool {
	var err error
	if static := len(m.static) / PageSize; i < static {
		err = checkStatic(m.static[i*PageSize:], m.seed, uint64(i))
	} else {
		n := i - static
		mu := m.lock(n)
		err = checkPage(m.page(n), m.seed, uint64(n), m.gens[n])
		mu.Unlock()
	}
	m.checked.Add(1)
	if err != nil {
		m.mismatches.Add(1)
		m.problems.Add(fmt.Errorf("memory: %w", err))
	}
	return err == nil
}
