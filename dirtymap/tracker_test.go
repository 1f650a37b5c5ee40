package dirtymap

import (
	"fmt"
	"strings"
	"testing"
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
