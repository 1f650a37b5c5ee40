package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/lmctl/lmctl/dirtymap"
)

// nothingLeft checks both hosts for what a migration may leave behind: on the
// host of the guest there is the guest and nothing more, on the other nothing.
// An empty host means that the guest runs nowhere.
func (c *cluster) nothingLeft(g *flatGuest, host string) {
	c.T.Helper()
	for _, h := range c.Lab.Hosts() {
		c.Eventually("nothing of a migration is left on "+h, func() error { return c.tidy(g, h, h == host) })
	}
}

func (c *cluster) tidy(g *flatGuest, host string, has bool) error {
	want := 0
	if has {
		want = 1
	}
	pids := qemusOf(c.T, g.uuid, c.Lab.HostDir(host))
	if len(pids) != want {
		return fmt.Errorf("processes %v, want %d", pids, want)
	}
	memory, err := filepath.Glob(filepath.Join(c.Lab.MemoryDir(host), "*.ram"))
	if err != nil || len(memory) != want {
		return fmt.Errorf("memory files %q, want %d (%v)", memory, want, err)
	}
	if left, _ := filepath.Glob(filepath.Join(c.Lab.RunDir(host), "guests", "*", "suspension.json")); len(left) > 0 {
		return fmt.Errorf("unfinished suspension %q", left)
	}
	if run, _ := filepath.Glob(filepath.Join(c.Lab.RunDir(host), "guests", "*")); len(run) != want {
		return fmt.Errorf("run folders %q, want %d", run, want)
	}
	taps, err := c.taps(host)
	if err != nil || len(taps) != want*g.taps {
		return fmt.Errorf("taps %q, want %d (%v)", taps, want*g.taps, err)
	}
	for _, pid := range pids {
		if fds, err := dirtymap.Leftovers(pid); err != nil || len(fds) > 0 {
			return fmt.Errorf("tracker descriptors %v in process %d (%v)", fds, pid, err)
		}
		if flags := trackedFlags(c.T, pid); flags > 0 {
			return fmt.Errorf("%d mappings of process %d are still write-protected", flags, pid)
		}
	}
	return nil
}

// qemusOf finds the QEMU processes of a guest on a host by their command line.
func qemusOf(t *testing.T, uuid, hostDir string) []int {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, d := range dirs {
		b, err := os.ReadFile(d)
		if err != nil {
			continue // it has ended meanwhile
		}
		args := strings.Split(string(b), "\x00")
		if slices.Contains(args, uuid) && strings.Contains(string(b), hostDir+"/") {
			var pid int
			if _, err := fmt.Sscanf(d, "/proc/%d/", &pid); err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

// trackedFlags counts the mappings that a userfaultfd protects.
func trackedFlags(t *testing.T, pid int) (n int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return 0 // it has ended meanwhile
	}
	for line := range strings.Lines(string(b)) {
		if flags, ok := strings.CutPrefix(line, "VmFlags:"); ok && slices.ContainsFunc(strings.Fields(flags), func(f string) bool { return f == "uw" || f == "um" }) {
			n++
		}
	}
	return n
}

// taps lists the taps in a host's namespace.
func (c *cluster) taps(host string) (names []string, err error) {
	err = c.Lab.In(host, func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			if l.Type() == "tuntap" {
				names = append(names, l.Attrs().Name)
			}
		}
		return nil
	})
	return names, err
}
