package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/dirtymap"
)

// The fakes stand in for a hypervisor, so that the engine can be taken through
// failures that a real one cannot be made to produce. What they share with the
// real thing is memory: real files, really mapped.

func memFile(t *testing.T, name string, pages int) Memory {
	t.Helper()
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(int64(pages) * PageSize); err != nil {
		t.Fatal(err)
	}
	return Memory{Name: name, File: f, Size: int64(pages) * PageSize}
}

func contents(t *testing.T, m Memory) []byte {
	t.Helper()
	b := make([]byte, m.Size)
	if _, err := m.File.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// fakeTracker is told of writes by the fake guest.
type fakeTracker struct {
	mu     sync.Mutex
	maps   []*dirtymap.Bitmap
	closed int
}

func (f *fakeTracker) mark(block, page int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.maps[block].Set(page)
}

func (f *fakeTracker) Peek(into []*dirtymap.Bitmap) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.add(into)
	return nil
}

func (f *fakeTracker) Collect(into []*dirtymap.Bitmap) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.add(into)
	reset(f.maps)
	return nil
}

func (f *fakeTracker) add(into []*dirtymap.Bitmap) {
	for i := range into {
		into[i].Union(f.maps[i])
	}
}

func (f *fakeTracker) Close() error { f.closed++; return nil }

// fakeGuest writes its memory until it is suspended.
type fakeGuest struct {
	t       *testing.T
	mem     []Memory
	tracker *fakeTracker
	state   []byte
	forget  bool // leave writes out of the bitmap

	mu        sync.Mutex // held while it writes; a stopped guest does not
	running   bool
	resumed   int
	released  bool
	forwarded bool
	w         io.Writer
	refuse    error
	saveErr   error
	quit      chan struct{}
	wg        sync.WaitGroup
}

func newFakeGuest(t *testing.T, pages ...int) *fakeGuest {
	g := &fakeGuest{t: t, tracker: &fakeTracker{}, state: bytes.Repeat([]byte("device state "), 50_000), running: true, quit: make(chan struct{})}
	for i, n := range pages {
		m := memFile(t, "ram"+string(rune('0'+i)), n)
		g.mem = append(g.mem, m)
		g.tracker.maps = append(g.tracker.maps, dirtymap.New(n))
		for p := range n {
			if p%3 != 0 { // every third page stays a hole
				g.put(i, p)
			}
		}
	}
	g.wg.Add(1)
	go g.write()
	t.Cleanup(func() { close(g.quit); g.wg.Wait() })
	return g
}

func (g *fakeGuest) put(block, page int) {
	b := bytes.Repeat([]byte{byte(rand.IntN(4))}, PageSize) // often zero
	if _, err := g.mem[block].File.WriteAt(b, int64(page)*PageSize); err != nil {
		g.t.Error(err)
	}
}

func (g *fakeGuest) forgetWrites() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.forget = true
}

func (g *fakeGuest) write() {
	defer g.wg.Done()
	for {
		select {
		case <-g.quit:
			return
		default:
		}
		g.mu.Lock()
		if g.running {
			b := rand.IntN(len(g.mem))
			p := rand.IntN(int(g.mem[b].Size) / PageSize / 4)
			g.put(b, p)
			if !g.forget {
				g.tracker.mark(b, p)
			}
		}
		g.mu.Unlock()
	}
}

func (g *fakeGuest) Name() string { return "fake" }
func (g *fakeGuest) Prepared(answer []byte) error {
	if string(answer) != "from the shell" {
		return fmt.Errorf("the shell answered %q", answer)
	}
	return nil
}

func (g *fakeGuest) UUID() string                               { return testID.String() }
func (g *fakeGuest) Definition(context.Context) ([]byte, error) { return []byte("definition"), nil }
func (g *fakeGuest) Process() Process                           { return Process{PID: os.Getpid(), PIDFD: -1} }
func (g *fakeGuest) Memory(context.Context) ([]Memory, error)   { return g.mem, nil }
func (g *fakeGuest) Movable(context.Context) error              { return g.refuse }
func (g *fakeGuest) Discards(context.Context) (bool, error)     { return false, nil }
func (g *fakeGuest) Drain(context.Context) error                { return nil }
func (g *fakeGuest) Forward(context.Context) (int, error)       { g.forwarded = true; return 0, nil }
func (g *fakeGuest) Release(context.Context) error              { g.released = true; return nil }

func (g *fakeGuest) Suspend(_ context.Context, w io.Writer) (time.Time, error) {
	g.w = w
	if _, err := w.Write(g.state[:1000]); err != nil {
		return time.Time{}, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.running = false
	return time.Now(), nil
}

func (g *fakeGuest) SaveState(context.Context) error {
	if g.saveErr != nil {
		return g.saveErr
	}
	_, err := g.w.Write(g.state[1000:])
	return err
}

func (g *fakeGuest) Resume(context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.running = true
	g.resumed++
	return nil
}

// fakeShell loads the state and remembers what was done to it.
type fakeShell struct {
	mem       []Memory
	loaded    []byte
	end       []byte // of what a relayed stream ends with
	loadErr   error
	resumeErr error
	resumed   bool
	destroyed bool
	lost      chan struct{}
}

func (s *fakeShell) Answer() []byte { return []byte("from the shell") }

func (s *fakeShell) Memory() []Memory { return s.mem }

// fakeAnswer is what the shell's hypervisor says when it has all of a stream.
const fakeAnswer = "thank you"

func (s *fakeShell) LoadState(_ context.Context, r io.Reader, answers io.Writer) (err error) {
	if s.loadErr != nil {
		return s.loadErr
	}
	for answers != nil && (len(s.end) == 0 || !bytes.HasSuffix(s.loaded, s.end)) {
		part := make([]byte, 64<<10)
		n, err := r.Read(part)
		if s.loaded = append(s.loaded, part[:n]...); err != nil {
			return err
		}
	}
	if answers != nil {
		if _, err := io.WriteString(answers, fakeAnswer); err != nil {
			return err
		}
	}
	rest, err := io.ReadAll(r)
	s.loaded = append(s.loaded, rest...)
	return err
}
func (s *fakeShell) Resume(context.Context) error {
	if s.resumeErr == nil {
		s.resumed = true
	}
	return s.resumeErr
}
func (s *fakeShell) Announce(context.Context) (int, error) { return 2, nil }
func (s *fakeShell) Destroy(context.Context) error         { s.destroyed = true; return nil }
func (s *fakeShell) Lost() <-chan struct{}                 { return s.lost }

// fakeHost makes one shell.
type fakeHost struct {
	t     *testing.T
	err   error
	shell *fakeShell
	guest *fakeGuest
}

func (h *fakeHost) Prepare(_ context.Context, o Offer) (Shell, error) {
	if h.err != nil {
		return nil, h.err
	}
	if string(o.Definition) != "definition" {
		h.t.Errorf("definition %q", o.Definition)
	}
	h.shell.lost = make(chan struct{})
	for _, b := range slices.Backward(o.Blocks) { // in another order than the source's
		m := memFile(h.t, b.Name, int(b.Size/PageSize))
		// What an earlier guest has left there must not become this one's.
		if _, err := m.File.WriteAt(bytes.Repeat([]byte{0xee}, int(b.Size)), 0); err != nil {
			h.t.Error(err)
		}
		h.shell.mem = append(h.shell.mem, m)
	}
	return h.shell, nil
}

// fakeLedger is both sides' and writes down what was asked of it.
type fakeLedger struct {
	mu     sync.Mutex
	calls  []string
	fail   map[string]error
	before func(call string)
}

func (l *fakeLedger) call(name string) error {
	if l.before != nil {
		l.before(name)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls = append(l.calls, name)
	return l.fail[name]
}

func (l *fakeLedger) has(name string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Contains(l.calls, name)
}

type fakeSourceLedger struct{ *fakeLedger }

func (l fakeSourceLedger) Begin(context.Context, Handover) error    { return l.call("begin") }
func (l fakeSourceLedger) HandOver(context.Context, Handover) error { return l.call("hand over") }
func (l fakeSourceLedger) Reclaim(context.Context, Handover) error  { return l.call("reclaim") }
func (l fakeSourceLedger) Cancel(context.Context, Handover) error   { return l.call("cancel") }
func (l fakeSourceLedger) Forget(context.Context, Handover) error   { return l.call("forget") }

type fakeDestLedger struct{ *fakeLedger }

func (l fakeDestLedger) Prepare(context.Context, Handover) error  { return l.call("prepare") }
func (l fakeDestLedger) Accept(context.Context, Handover) error   { return l.call("accept") }
func (l fakeDestLedger) Own(context.Context, Handover) error      { return l.call("own") }
func (l fakeDestLedger) Withdraw(context.Context, Handover) error { return l.call("withdraw") }
func (l fakeDestLedger) Drop(context.Context, Handover) error     { return l.call("drop") }

// fakeRun is one migration between two engines over loopback.
type fakeRun struct {
	t         *testing.T
	guest     *fakeGuest
	host      *fakeHost
	ledger    *fakeLedger
	options   Options
	tune      func(*Sender, *Job, *Receiver)
	undecided chan Incoming

	mu    sync.Mutex
	conns []net.Conn // the source's ends
}

func newFakeRun(t *testing.T) *fakeRun {
	g := newFakeGuest(t, 3000, 17)
	return &fakeRun{
		t: t, guest: g, host: &fakeHost{t: t, shell: &fakeShell{}, guest: g},
		ledger: &fakeLedger{fail: map[string]error{}}, undecided: make(chan Incoming, 1),
		options: Options{Verify: true, MaxPasses: 3},
	}
}

// cut breaks every connection as a failing network does not: at once. The
// engine must not care how it learns.
func (r *fakeRun) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.conns {
		c.Close()
	}
}

func (r *fakeRun) migrate(ctx context.Context) (*Report, *Error) {
	r.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		r.t.Fatal(err)
	}
	recv := &Receiver{Name: "host2", Host: r.host, Ledger: fakeDestLedger{r.ledger}, Undecided: func(in Incoming) { r.undecided <- in }}
	var serving sync.WaitGroup
	serving.Add(1)
	go func() {
		defer serving.Done()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Add(1)
			go func() {
				defer serving.Done()
				if err := recv.Serve(context.Background(), c, "host1"); err != nil {
					r.t.Log("destination:", err)
				}
			}()
		}
	}()
	send := &Sender{Host: "host1", Ledger: fakeSourceLedger{r.ledger}, Track: func(Process, []dirtymap.Region) (Tracker, error) { return r.guest.tracker, nil }}
	job := Job{ID: testID.String(), Guest: r.guest, Epoch: 6, Destination: "host2", Options: r.options}
	job.Dial = func(ctx context.Context) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
		if err == nil {
			r.mu.Lock()
			r.conns = append(r.conns, c)
			r.mu.Unlock()
		}
		return c, err
	}
	if r.tune != nil {
		r.tune(send, &job, recv)
	}
	report, err := send.Migrate(ctx, job)
	l.Close()
	serving.Wait()
	if report == nil {
		r.t.Fatal("no report")
	}
	if err == nil {
		return report, nil
	}
	var e *Error
	if !errors.As(err, &e) {
		r.t.Fatalf("not an *Error: %v", err)
	}
	if report.Result != e.Result || report.Error == "" {
		r.t.Errorf("report says %s %q, error says %s", report.Result, report.Error, e.Result)
	}
	return report, e
}

// equalMemory compares the stopped guest with the shell.
func (r *fakeRun) equalMemory() {
	r.t.Helper()
	for _, m := range r.guest.mem {
		i := slices.IndexFunc(r.host.shell.mem, func(o Memory) bool { return o.Name == m.Name })
		if !bytes.Equal(contents(r.t, m), contents(r.t, r.host.shell.mem[i])) {
			r.t.Errorf("block %s differs", m.Name)
		}
	}
}
