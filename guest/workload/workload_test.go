package workload

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lmctl/lmctl/guest/control"
	"github.com/lmctl/lmctl/internal/testenv"
)

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); <-tick.C {
		if ok() {
			return
		}
	}
	t.Fatalf("did not come: %s", what)
}

// start runs f until the test ends, and then waits for it.
func start(t *testing.T, fs ...func(context.Context)) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, f := range fs {
		wg.Go(func() { f(ctx) })
	}
	t.Cleanup(func() { cancel(); wg.Wait() })
}

func TestPageShowsDamage(t *testing.T) {
	p, q := make([]byte, PageSize), make([]byte, PageSize)
	fillPage(p, 1, 7, 3)
	if err := checkPage(p, 1, 7, 3); err != nil {
		t.Fatal(err)
	}
	for i := range PageSize {
		copy(q, p)
		q[i] ^= 0x10
		if checkPage(q, 1, 7, 3) == nil {
			t.Fatalf("a flipped bit in byte %d goes unseen", i)
		}
	}
	for what, err := range map[string]error{
		"another page's content": checkPage(p, 1, 8, 3),
		"an older generation":    checkPage(p, 1, 7, 4),
		"another seed":           checkPage(p, 2, 7, 3),
		"a page never written":   checkPage(p, 1, 7, 0),
		"a page of zeros":        checkPage(make([]byte, PageSize), 1, 0, 1),
	} {
		if err == nil {
			t.Errorf("unseen: %s", what)
		}
	}
	if err := checkPage(make([]byte, PageSize), 1, 7, 0); err != nil {
		t.Error(err)
	}
	fillStatic(p, 1, 7)
	if checkStatic(p, 1, 7) != nil || checkStatic(p, 1, 6) == nil {
		t.Error("static content is not told apart")
	}
}

func memory(t *testing.T, s control.MemorySetting) (*Memory, *Problems) {
	t.Helper()
	var problems Problems
	m, err := NewMemory(s, 4<<20, 1<<20, 5, &problems)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m, &problems
}

func TestMemoryWritesAndChecks(t *testing.T) {
	for _, pattern := range []control.Pattern{control.Sequential, control.Random, control.Rewrite} {
		for _, rate := range []int64{control.Unbounded, 64 << 20} {
			t.Run(fmt.Sprint(pattern, rate), func(t *testing.T) {
				m, problems := memory(t, control.MemorySetting{Rate: rate, WorkingSet: 1 << 20, Pattern: pattern, CheckRate: 1 << 30})
				before := m.Status().Written
				if before != 256 {
					t.Errorf("%d pages written at the start, want 256", before)
				}
				start(t, m.Write, m.Check)
				await(t, "1000 pages written, two sweeps", func() bool {
					s := m.Status()
					return s.Written > before+1000 && s.Sweeps >= 2
				})
				if wrong, err := m.CheckAll(t.Context()); wrong != 0 || err != nil {
					t.Errorf("%d pages wrong, error %v", wrong, err)
				}
				if s := m.Status(); s.Mismatches != 0 || len(problems.List()) != 0 {
					t.Errorf("mismatches without a cause: %+v, %q", s, problems.List())
				}
			})
		}
	}
}

func TestMemoryFindsDamage(t *testing.T) {
	m, problems := memory(t, control.MemorySetting{WorkingSet: 1 << 20, Pattern: control.Sequential, CheckRate: 1 << 30})
	mu := m.lock(3)
	m.page(3)[100]++
	mu.Unlock()
	m.static[5*PageSize+8]++
	if wrong, err := m.CheckAll(t.Context()); wrong != 2 || err != nil {
		t.Errorf("%d pages wrong, error %v, want 2", wrong, err)
	}
	start(t, m.Check)
	await(t, "the background finds both too", func() bool { return m.Status().Mismatches >= 4 })
	if list := strings.Join(problems.List(), "\n"); !strings.Contains(list, "static page 5") || !strings.Contains(list, "page 3, written 1 times") {
		t.Errorf("problems: %s", list)
	}
}

func TestMemorySettingChanges(t *testing.T) {
	m, _ := memory(t, control.MemorySetting{WorkingSet: 1 << 20, Pattern: control.Sequential})
	start(t, m.Write, m.Check)
	if err := m.Set(control.MemorySetting{Rate: control.Unbounded, WorkingSet: 2 << 20, Pattern: control.Random}); err != nil {
		t.Fatal(err)
	}
	await(t, "the writer has begun", func() bool { return m.Status().Written > 2000 })
	if err := m.Set(control.MemorySetting{WorkingSet: 1 << 20, Pattern: control.Sequential}); err != nil {
		t.Fatal(err)
	}
	if err := m.Set(control.MemorySetting{WorkingSet: 8 << 20, Pattern: control.Sequential}); err == nil {
		t.Error("a working set beyond the room is accepted")
	}
	if err := m.Set(control.MemorySetting{Rate: -5}); err == nil {
		t.Error("a bad setting is accepted")
	}
	if got := m.Status().Setting; got.WorkingSet != 1<<20 || got.Rate != 0 {
		t.Errorf("setting %+v", got)
	}
}

func disk(t *testing.T, path string, s control.DiskSetting) (*Disk, *Problems) {
	t.Helper()
	var problems Problems
	d, err := OpenDisk(path, s, 5, &problems)
	if err != nil {
		if strings.Contains(err.Error(), "invalid argument") {
			testenv.Lacks(t, "O_DIRECT in the file system of temporary folders", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d, &problems
}

func diskFile(t *testing.T, records int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, records*RecordSize); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDiskGoesOnWhereItWas(t *testing.T) {
	path := diskFile(t, 10)
	d, _ := disk(t, path, control.DiskSetting{})
	for range 23 {
		if err := d.append(); err != nil {
			t.Fatal(err)
		}
	}
	again, problems := disk(t, path, control.DiskSetting{})
	if last := again.Status().Last; last != 23 {
		t.Errorf("last record %d, want 23", last)
	}
	if wrong, err := again.CheckAll(t.Context()); wrong != 0 || err != nil {
		t.Errorf("%d records wrong, error %v, %q", wrong, err, problems.List())
	}
	if got := again.Status().Checked; got != 10 {
		t.Errorf("%d records checked, want 10", got)
	}
}

func TestDiskFindsLoss(t *testing.T) {
	path := diskFile(t, 10)
	d, problems := disk(t, path, control.DiskSetting{})
	for range 5 {
		if err := d.append(); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, RecordSize), 3*RecordSize); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	wrong, err := d.CheckAll(t.Context())
	if wrong != 1 || err != nil || d.Status().Mismatches != 1 || len(problems.List()) != 1 {
		t.Errorf("%d records wrong, error %v, %+v, %q", wrong, err, d.Status(), problems.List())
	}
}

func TestDiskUnderLoad(t *testing.T) {
	d, problems := disk(t, diskFile(t, 64), control.DiskSetting{Rate: control.Unbounded, Readers: 3})
	start(t, d.Write, d.Read)
	await(t, "200 records and 500 reads", func() bool {
		s := d.Status()
		return s.Last > 200 && s.Checked > 500
	})
	if err := d.Set(control.DiskSetting{}); err != nil {
		t.Fatal(err)
	}
	if wrong, err := d.CheckAll(t.Context()); wrong != 0 || err != nil {
		t.Errorf("%d records wrong, error %v", wrong, err)
	}
	if s := d.Status(); s.Mismatches != 0 || s.Errors != 0 {
		t.Errorf("%+v, %q", s, problems.List())
	}
}

func TestClockCountsAndMeters(t *testing.T) {
	c, err := NewClock(time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	t0 := time.Now()
	c.step(t0)
	c.step(t0.Add(time.Millisecond))
	c.step(t0.Add(41 * time.Millisecond))
	c.step(t0.Add(42 * time.Millisecond))
	if s := c.Status(); s.LargestGap != 40*time.Millisecond || s.Ticks != 4 {
		t.Errorf("%+v", s)
	}
	if c.word[0] != 4 {
		t.Errorf("the word in memory says %d", c.word[0])
	}
	c.Reset()
	c.step(t0.Add(43 * time.Millisecond))
	if s := c.Status(); s.LargestGap != time.Millisecond {
		t.Errorf("after a reset: %+v", s)
	}
	if os.Getuid() == 0 && c.Status().TickGPA == 0 {
		t.Error("physical address of the word not known, though root")
	}
	if c.SetTick(time.Hour) == nil {
		t.Error("a tick of an hour is accepted")
	}
	start(t, c.Run)
	await(t, "ticks", func() bool { return c.Status().Ticks > 10 })
}

func TestNumberedReplies(t *testing.T) {
	n := NewNet("boot", time.Now())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	start(t, func(ctx context.Context) {
		if err := n.Number(ctx, l); err != nil {
			t.Error(err)
		}
	})
	own := uint64(0)
	for range 2 {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		in := bufio.NewScanner(c)
		for seq := uint64(1); seq <= 3; seq++ {
			if _, err := fmt.Fprintf(c, "%d\n", seq); err != nil {
				t.Fatal(err)
			}
			own++
			var gotSeq, gotOwn, ns uint64
			var boot string
			if !in.Scan() {
				t.Fatal(in.Err())
			}
			if _, err := fmt.Sscan(in.Text(), &gotSeq, &gotOwn, &ns, &boot); err != nil {
				t.Fatalf("%q: %v", in.Text(), err)
			}
			if gotSeq != seq || gotOwn != own || boot != "boot" {
				t.Errorf("request %d, reply %q", seq, in.Text())
			}
		}
		if _, err := fmt.Fprintln(c, "9\nnonsense"); err != nil {
			t.Fatal(err)
		}
		own++
		if !in.Scan() || in.Scan() {
			t.Errorf("nonsense is answered: %q", in.Text())
		}
	}
	if s := n.Status(); s.Accepted != 2 || s.Replies != own || s.OutOfOrder != 2 {
		t.Errorf("%+v", s)
	}
}

func TestEcho(t *testing.T) {
	n := NewNet("boot", time.Now())
	pc, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	at := pc.LocalAddr().String()
	start(t, func(ctx context.Context) {
		if err := n.Echo(ctx, pc); err != nil {
			t.Error(err)
		}
	})
	c, err := net.Dial("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	size, err := c.Read(buf)
	if err != nil || string(buf[:size]) != "hello" {
		t.Errorf("%q, error %v", buf[:size], err)
	}
	await(t, "it is counted", func() bool { return n.Status().Echoed == 1 })
}
