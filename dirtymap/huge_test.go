//go:build amd64

package dirtymap

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/testenv"
)

// TestTransparentHugePages: whatever the kernel does to a huge page that was
// written, nothing is lost.
func TestTransparentHugePages(t *testing.T) {
	requireTracking(t)
	dir := shmDir(t)
	if err := unix.Mount("dirtymap-test", dir, "tmpfs", 0, "huge=always,size=64m"); err != nil {
		testenv.Lacks(t, "a tmpfs with huge pages", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	tg := startTarget(t, dir, 4*blockPages)
	tg.do(t, "write 0 1024")
	huge := tg.hugePages(t)
	tr := attach(t, tg)
	for _, step := range []struct{ do, want string }{
		{"write 3 4", "3"},
		{"write 1024 1025", "1024-1535"}, // new, and huge: the file holds all of it
		{"write 1100 1101", "1100"},
		{"write 1536 1537", "1536-2047"},
		{"read 0 2048", ""},
	} {
		tg.do(t, "%s", step.do)
		if huge == 0 {
			step.want = strings.Split(step.want, "-")[0]
		}
		if got := tg.collect(t, tr); got != step.want {
			t.Errorf("%s: pages %q, want %q", step.do, got, step.want)
		}
	}
	tg.do(t, "write 600 601")
	tg.do(t, "split 512 700")
	if got := tg.collect(t, tr); got != "600" {
		t.Errorf("after a split: pages %q", got)
	}
	if huge == 0 {
		testenv.Lacks(t, "huge pages in shared memory", errors.New("the kernel made none: their changes went untested"))
	}
}

// hugePages returns how much is mapped by huge pages, in KiB.
func (tg *target) hugePages(t *testing.T) (kib int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", tg.PID))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "ShmemPmdMapped:"); ok {
			if _, err := fmt.Sscan(v, &kib); err != nil {
				t.Fatal(err)
			}
		}
	}
	return kib
}

// TestHugetlb: a write to a huge page marks all of it.
func TestHugetlb(t *testing.T) {
	requireTracking(t)
	dir := shmDir(t)
	const huge, pages = 3, 3 * blockPages
	reserveHugePages(t, huge)
	if err := unix.Mount("dirtymap-test", dir, "hugetlbfs", 0, "pagesize=2M"); err != nil {
		testenv.Lacks(t, "hugetlbfs", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	tg := startTarget(t, dir, pages)
	tg.do(t, "write 0 1")
	if _, err := Attach(tg.Process, []Region{{tg.Region.Addr, blockSize + PageSize}}); err == nil || !strings.Contains(err.Error(), "cuts a page") {
		t.Errorf("half a huge page: %v", err)
	}
	tr := attach(t, tg)
	for _, step := range []struct{ do, want string }{
		{"read 0 1", ""},
		{"write 700 701", "512-1023"},
		{"write 3 4", "0-511"},
		{"write 1030 1031", "1024-1535"},
		{"read 0 1536", ""},
	} {
		tg.do(t, "%s", step.do)
		if got := tg.peek(t, tr); got != step.want {
			t.Errorf("peek: %s: pages %q, want %q", step.do, got, step.want)
		}
		if got := tg.collect(t, tr); got != step.want {
			t.Errorf("%s: pages %q, want %q", step.do, got, step.want)
		}
	}
	tg.do(t, "write 512 513")
	tg.do(t, "dontneed 512 1024")
	if got := tg.collect(t, tr); got != "512-1023" {
		t.Errorf("written and dropped: pages %q", got)
	}
	tg.do(t, "write 512 513")
	if got := tg.collect(t, tr); got != "512-1023" {
		t.Errorf("written afterwards: pages %q", got)
	}
}

// reserveHugePages makes the kernel set aside n more huge pages for the test.
func reserveHugePages(t *testing.T, n int) {
	t.Helper()
	const path = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
	adjust := func(by int) (int, error) {
		b, err := os.ReadFile(path)
		if err != nil {
			return 0, err
		}
		var was int
		if _, err := fmt.Sscan(string(b), &was); err != nil {
			return 0, err
		}
		return was, os.WriteFile(path, []byte(fmt.Sprint(was+by)), 0)
	}
	was, err := adjust(n)
	if err != nil {
		testenv.Lacks(t, "huge pages", err)
	}
	t.Cleanup(func() {
		if _, err := adjust(-n); err != nil {
			t.Error(err)
		}
	})
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if strings.TrimSpace(string(b)) != fmt.Sprint(was+n) {
		testenv.Lacks(t, "memory for huge pages", fmt.Errorf("%d wanted besides %d, there are %s", n, was, b))
	}
}
