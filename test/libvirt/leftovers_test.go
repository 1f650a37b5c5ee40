package libvirt

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/lab/domain"
)

// nothingLeft checks both hosts for what a migration may leave behind: on the
// host of the guest there is the guest and nothing more, on the other nothing.
// An empty host means that the guest runs nowhere.
func (c *cluster) nothingLeft(g lab.Guest, host string) {
	c.T.Helper()
	for _, h := range c.Lab.Hosts() {
		c.Eventually("nothing of a migration is left on "+h, func() error { return c.tidy(g, h, h == host) })
	}
	running := 0
	if host != "" {
		running = 1
	}
	if pids := c.processes(g); len(pids) != running {
		c.T.Errorf("processes %v of guest %s, want %d", pids, g.Name, running)
	}
}

func (c *cluster) tidy(g lab.Guest, host string, runs bool) error {
	if err := c.noFiles(g, host); err != nil {
		return err
	}
	active, err := c.Lab.Output(c.Context(), host, "virsh", "list", "--name")
	if err != nil {
		return err
	}
	if has := slices.Contains(strings.Fields(string(active)), g.Name); has != runs {
		return fmt.Errorf("its libvirt runs %q", strings.Fields(string(active)))
	}
	want := 0
	if runs && g.Shape.Backing != domain.Private { // memfd has a folder too
		want = 1
	}
	memory, err := filepath.Glob(filepath.Join(c.Lab.MemoryDir(host), "libvirt", "qemu", "*-"+g.Name))
	if err != nil || len(memory) != want {
		return fmt.Errorf("memory %q, want %d (%v)", memory, want, err)
	}
	if !runs {
		return nil
	}
	pid, err := c.pid(g, host)
	if err != nil {
		return err
	}
	if fds, err := dirtymap.Leftovers(pid); err != nil || len(fds) > 0 {
		return fmt.Errorf("tracker descriptors %v in process %d (%v)", fds, pid, err)
	}
	on, err := c.capabilities(g, host)
	if err == nil && strings.Contains(on, "x-ignore-shared") {
		err = fmt.Errorf("migration capabilities %s", on)
	}
	return err
}

// noFiles checks that the agent of a host keeps nothing of a guest's migrations.
func (c *cluster) noFiles(g lab.Guest, host string) error {
	path := filepath.Join(c.Lab.Outside(host, "/run/lmctl"), "libvirt", g.UUID)
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s is there (%v)", path, err)
	}
	return nil
}

// traces is what a host has of a guest: its line in virsh list, and all files by
// its name or UUID but logs, disks, what an agent remembers of guests, and what a
// libvirtd leaves half written when it is killed. Numbers that libvirt gives to
// those that run are left out.
type traces []string

var domainNumber = regexp.MustCompile(`\b\d+-`)

func (c *cluster) traces(g lab.Guest, host string) traces {
	c.T.Helper()
	var found traces
	for line := range strings.Lines(c.virsh(host, "list", "--all")) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[1] == g.Name {
			found = append(found, strings.Join(fields[1:], " "))
		}
	}
	root := filepath.Join(c.Lab.Dir(), "hosts", host)
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it has gone meanwhile
		}
		if err != nil {
			return err
		}
		path = strings.TrimPrefix(path, root)
		if path == "/disk/libvirt/log" || path == "/disk/state" {
			return fs.SkipDir
		}
		halfWritten := strings.HasPrefix(path, "/run/libvirt/") && strings.HasSuffix(path, ".new")
		if !halfWritten && (strings.Contains(path, g.Name) || strings.Contains(path, g.UUID)) {
			found = append(found, domainNumber.ReplaceAllString(path, ""))
		}
		return nil
	})
	if err != nil {
		c.T.Fatal(err)
	}
	return found
}

// atRest is what is left of a guest that has ended.
func (t traces) atRest() traces {
	var left traces
	for _, trace := range t {
		switch name, state, is := strings.Cut(trace, " "); {
		case is && state == "running":
			left = append(left, name+" shut off")
		case strings.HasPrefix(trace, "/disk/libvirt/etc/"):
			left = append(left, trace)
		}
	}
	return left
}

// pid is that of a guest's QEMU on a host.
func (c *cluster) pid(g lab.Guest, host string) (int, error) {
	text, err := os.ReadFile(c.Lab.Outside(host, "/run/libvirt/qemu/"+g.Name+".pid"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

// processes are all QEMUs of a guest.
func (c *cluster) processes(g lab.Guest) []int {
	c.T.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		c.T.Fatal(err)
	}
	var pids []int
	for _, path := range lines {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended meanwhile
		}
		if bytes.Contains(b, []byte("-uuid\x00"+g.UUID+"\x00")) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			if err != nil {
				c.T.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

// capabilities are the migration capabilities of a guest's QEMU that are on.
func (c *cluster) capabilities(g lab.Guest, host string) (string, error) {
	out, err := c.Lab.Output(c.Context(), host, "virsh", "qemu-monitor-command", g.Name, "--hmp", "info migrate_capabilities")
	if err != nil {
		return "", err
	}
	var on []string
	for line := range strings.Lines(string(out)) {
		if name, state, ok := strings.Cut(strings.TrimSpace(line), ": "); ok && state == "on" {
			on = append(on, name)
		}
	}
	return strings.Join(on, " "), nil
}

// settings are the migration settings of a guest's QEMU, which a migration may not
// change.
type settings struct {
	capabilities string // those that are on
	parameters   string // empty if they cannot be compared
}

func (c *cluster) settings(g lab.Guest, host string) settings {
	c.T.Helper()
	on, err := c.capabilities(g, host)
	if err != nil {
		c.T.Fatal(err)
	}
	return settings{capabilities: on, parameters: c.virsh(host, "qemu-monitor-command", g.Name, "--hmp", "info migrate_parameters")}
}

// sameSettings checks that a guest's QEMU has the settings of before.
func (c *cluster) sameSettings(g lab.Guest, host string, before settings) {
	c.T.Helper()
	now := c.settings(g, host)
	if now.capabilities != before.capabilities {
		c.T.Errorf("capabilities %q on %s, were %q at first", now.capabilities, host, before.capabilities)
	}
	if before.parameters != "" && now.parameters != before.parameters {
		c.T.Errorf("parameters on %s:\n%s\nat first:\n%s", host, now.parameters, before.parameters)
	}
}

// diskOwner says whether the disk of a guest that runs is still QEMU's to open.
func (c *cluster) diskOwner(g lab.Guest) error {
	paths, err := filepath.Glob(filepath.Join(c.Lab.Storage(), g.Name+".*"))
	if err != nil || len(paths) != 1 {
		return fmt.Errorf("disks %q (%v)", paths, err)
	}
	info, err := os.Stat(paths[0])
	if err != nil {
		return err
	}
	u, err := user.Lookup(qemuUser)
	if err != nil {
		return err
	}
	if st := info.Sys().(*syscall.Stat_t); strconv.Itoa(int(st.Uid)) != u.Uid {
		return fmt.Errorf("%s belongs to user %d, and QEMU is %s", paths[0], st.Uid, u.Uid)
	}
	return nil
}
