//go:build amd64

package dirtymap

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const blockPages = blockSize / PageSize

// pagesOf lists the runs of a bitmap, as "0-3 7".
func pagesOf(b *Bitmap) string {
	var s []string
	for lo, n := range b.Runs() {
		if n == 1 {
			s = append(s, fmt.Sprint(lo))
		} else {
			s = append(s, fmt.Sprintf("%d-%d", lo, lo+n-1))
		}
	}
	return strings.Join(s, " ")
}

func attach(t *testing.T, tg *target) *Tracker {
	t.Helper()
	tr, err := Attach(tg.Process, []Region{tg.Region})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
	})
	return tr
}

func (tg *target) collect(t *testing.T, tr *Tracker) string {
	t.Helper()
	b := New(int(tg.Region.Size / PageSize))
	if err := tr.Collect([]*Bitmap{b}); err != nil {
		t.Fatal(err)
	}
	return pagesOf(b)
}

func (tg *target) peek(t *testing.T, tr *Tracker) string {
	t.Helper()
	b := New(int(tg.Region.Size / PageSize))
	if err := tr.Peek([]*Bitmap{b}); err != nil {
		t.Fatal(err)
	}
	return pagesOf(b)
}

// TestPageTables pins what the kernel reports in each of the cases that page
// tables can be in. Block 0 holds data before tracking begins, block 1 is used
// only afterwards, and block 2 never.
func TestPageTables(t *testing.T) {
	requireTracking(t)
	for _, c := range []struct {
		name string
		do   []string // before the Collect that is looked at
		want string
		then []string // after it
		last string   // and what the next one finds
	}{
		{name: "idle"},
		{name: "write", do: []string{"write 3 5", "write 9 10"}, want: "3-4 9"},
		{name: "read what is protected", do: []string{"read 0 512"}},
		{name: "write after a read", do: []string{"read 0 512", "write 7 8"}, want: "7"},
		{name: "a page never touched, beside some that were", do: []string{"write 200 201"}, want: "200"},
		{name: "first write to a block", do: []string{"write 700 701"}, want: "700",
			then: []string{"write 900 901", "read 600 900"}, last: "900"},
		{name: "written and dropped", do: []string{"write 3 5", "dontneed 3 5"}, want: "3-4"},
		{name: "clean and dropped", do: []string{"dontneed 3 5"}},
		{name: "clean, dropped and read", do: []string{"dontneed 3 5", "read 3 5"}},
		{name: "clean, dropped and written", do: []string{"dontneed 3 5", "write 4 5"}, want: "4"},
		{name: "a whole block written and dropped with its page table",
			do: []string{"write 0 512", "dontneed 0 512"}, want: "0-511", then: []string{"write 5 6"}, last: "5"},
		{name: "a new block written and dropped with its page table",
			do: []string{"write 512 1024", "dontneed 512 1024"}, want: "512-1023", then: []string{"write 515 516"}, last: "515"},
		{name: "hole punched in written pages", do: []string{"write 3 5", "remove 3 5"}, want: "3-4"},
		{name: "hole punched and written", do: []string{"remove 3 5", "write 4 5"}, want: "4"},
		{name: "reclaimed", do: []string{"write 3 5", "pageout 0 512"}, want: "3-4"},
	} {
		t.Run(c.name, func(t *testing.T) {
			tg := startTarget(t, shmDir(t), 3*blockPages)
			tg.do(t, "write 0 100")
			tr := attach(t, tg)
			if got := tg.collect(t, tr); got != "" {
				t.Fatalf("at first: pages %s", got)
			}
			for _, s := range c.do {
				tg.do(t, "%s", s)
			}
			if got := tg.peek(t, tr); got != c.want {
				t.Errorf("peek: pages %q, want %q", got, c.want)
			}
			if got := tg.collect(t, tr); got != c.want {
				t.Errorf("pages %q, want %q", got, c.want)
			}
			for _, s := range c.then {
				tg.do(t, "%s", s)
			}
			if got := tg.collect(t, tr); got != c.last {
				t.Errorf("then: pages %q, want %q", got, c.last)
			}
		})
	}
}

// TestVanishedTables: on a kernel that does not report a range without a page
// table, one that is gone is found out by looking.
func TestVanishedTables(t *testing.T) {
	requireTracking(t)
	tg := startTarget(t, shmDir(t), 3*blockPages)
	tg.do(t, "write 0 1536")
	tr := attach(t, tg)
	if got := tg.collect(t, tr); got != "" {
		t.Fatalf("at first: pages %s", got)
	}
	tg.do(t, "write 512 1024")
	tg.do(t, "dontneed 512 1024")
	s := tr.scanOf(true)
	c := tr.areas[0].chunks[0]
	there, _, err := pagemapScan(s.pagemap, anyPage(tg.Region.Addr+600*PageSize), c.probe)
	if err != nil {
		t.Fatal(err)
	}
	if len(there) != 0 {
		t.Fatal("a page that was given up is there")
	}
	b := New(3 * blockPages)
	c.found.Reset()
	if err := c.vanished(&s, b); err != nil {
		t.Fatal(err)
	}
	if got := pagesOf(b); got != "512-1023" {
		t.Errorf("pages %q of vanished tables", got)
	}
	if c.mapped.Test(1) {
		t.Error("the block counts as mapped still")
	}
	if err := c.scanFresh(&s, b); err != nil {
		t.Fatal(err)
	}
	if !c.mapped.Test(1) {
		t.Error("the block holds data and is not mapped again")
	}
	tg.do(t, "write 520 521")
	if got := tg.collect(t, tr); got != "520" {
		t.Errorf("then: pages %q", got)
	}
}

// TestMappedAnew: memory that is mapped anew is not tracked, and that is an error.
func TestMappedAnew(t *testing.T) {
	requireTracking(t)
	tg := startTarget(t, shmDir(t), 3*blockPages)
	tg.do(t, "write 0 1536")
	tr := attach(t, tg)
	tg.do(t, "remap 512 1024")
	if err := tr.Peek([]*Bitmap{New(3 * blockPages)}); !errors.Is(err, unix.EPERM) {
		t.Errorf("peek: %v", err)
	}
}

// TestAgainstModel writes, reads and gives up pages at random, and compares.
func TestAgainstModel(t *testing.T) {
	requireTracking(t)
	const pages = 6*blockPages + 17
	tg := startTarget(t, shmDir(t), pages)
	r := rand.New(rand.NewPCG(3, 4))
	tg.do(t, "write 0 700")
	tr := attach(t, tg)
	written, got := New(pages), New(pages)
	for pass := range 60 {
		written.Reset()
		for range r.IntN(20) {
			lo := r.IntN(pages)
			hi := min(pages, lo+1+r.IntN(1+r.IntN(900)))
			verb := []string{"write", "write", "write", "read", "dontneed", "pageout"}[r.IntN(6)]
			tg.do(t, "%s %d %d", verb, lo, hi)
			if verb == "write" {
				written.SetRange(lo, hi)
			}
		}
		got.Reset()
		op := tr.Peek
		if pass%3 != 0 {
			op = tr.Collect
		}
		if err := op([]*Bitmap{got}); err != nil {
			t.Fatal(err)
		}
		missed := written.Clone()
		missed.Subtract(got)
		if !missed.Empty() {
			t.Fatalf("pass %d: written, not reported: %s", pass, pagesOf(missed))
		}
		if pass%3 == 0 { // so that the next pass is compared with itself alone
			if err := tr.Collect([]*Bitmap{got}); err != nil {
				t.Fatal(err)
			}
		}
	}
}
