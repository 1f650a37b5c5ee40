//go:build amd64

package dirtymap

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
)

func TestAttachErrors(t *testing.T) {
	requireTracking(t)
	tg := startTarget(t, shmDir(t), 8)
	other := startTarget(t, shmDir(t), 8)
	dead := startTarget(t, shmDir(t), 8)
	killAndReap(t, dead.child)
	zombie := startTarget(t, shmDir(t), 8)
	if err := zombie.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := sys.WaitPidfd(t.Context(), zombie.PIDFD); err != nil {
		t.Fatal(err)
	}
	r := tg.Region
	for _, c := range []struct {
		name    string
		process Process
		region  Region
		want    error
		text    string
	}{
		{"another process' pidfd", Process{tg.PID, other.PIDFD}, r, ErrMismatch, ""},
		{"reaped", dead.Process, r, ErrExited, ""},
		{"not reaped", zombie.Process, r, ErrExited, ""},
		{"no pidfd", Process{tg.PID, 0}, r, unix.EBADF, "no pidfd"},
		{"nothing mapped", tg.Process, Region{Addr: r.Addr, Size: r.Size + PageSize<<20}, nil, "nothing is mapped"},
		{"not aligned", tg.Process, Region{Addr: r.Addr + 1, Size: PageSize}, nil, "not made of pages"},
		{"overflow", tg.Process, Region{Addr: r.Addr, Size: -r.Addr - PageSize}, nil, "nothing is mapped"},
		{"beyond all addresses", tg.Process, Region{Addr: r.Addr, Size: math.MaxUint64 - PageSize + 1}, nil, "not made of pages"},
	} {
		t.Run(c.name, func(t *testing.T) {
			tr, err := Attach(c.process, []Region{c.region})
			if err == nil {
				tr.Close()
				t.Fatal("attached")
			}
			if c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v", err)
			}
		})
	}
	tg.noUserfaultfd(t)
}

// TestTraced: a process has one tracer, and the error says which.
func TestTraced(t *testing.T) {
	requireTracking(t)
	v := startVictim(t)
	tracer := startRole(t, "tracer", fmt.Sprint(v.PID), "seized")
	tracer.line(t)
	_, err := Attach(v.Process, nil)
	var traced *TracedError
	if !errors.Is(err, ErrTraced) || !errors.As(err, &traced) || traced.Tracer != tracer.PID {
		t.Errorf("%v; its tracer is %d", err, tracer.PID)
	}
	killAndReap(t, tracer)
	tr, err := Attach(v.Process, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := tr.Close(); err != nil {
		t.Error(err)
	}
	v.healthy(t)
}

// TestFailsAfterCreation: what fails late leaves nothing in the process either.
func TestFailsAfterCreation(t *testing.T) {
	requireTracking(t)
	tg := startTarget(t, shmDir(t), 8)
	first := attach(t, tg)
	if _, err := Attach(tg.Process, []Region{tg.Region}); !errors.Is(err, unix.EBUSY) {
		t.Errorf("second tracker: %v", err)
	}
	tg.noUserfaultfd(t)
	tg.do(t, "write 2 3")
	if got := tg.collect(t, first); got != "2" {
		t.Errorf("the first tracker finds pages %q", got)
	}
}

// TestAttachLeavesNothingHere: neither descriptors nor threads pile up.
func TestAttachLeavesNothingHere(t *testing.T) {
	requireTracking(t)
	tg := startTarget(t, shmDir(t), 8)
	count := func() (fds, threads int) {
		for dir, n := range map[string]*int{"/proc/self/fd": &fds, "/proc/self/task": &threads} {
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			*n = len(entries)
		}
		return fds, threads
	}
	fds, threads := count()
	const rounds = 50
	for range rounds {
		for _, regions := range [][]Region{{tg.Region}, {tg.Region, {Addr: PageSize, Size: PageSize}}} {
			tr, err := Attach(tg.Process, regions)
			if err != nil {
				continue // nothing is mapped at the second region
			}
			if err := tr.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if now, _ := count(); now != fds {
		t.Errorf("%d descriptors, there were %d", now, fds)
	}
	until(t, "threads to end", func() bool {
		_, now := count()
		return now < threads+rounds/2
	})
	tg.noUserfaultfd(t)
}
